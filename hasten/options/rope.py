"""Checks the longest sequence and the scaling of RoPE. Types of scaling are checked by `hasten.loading.rope`, with the
config."""

from collections.abc import Mapping
from typing import Any

from hasten.options.values import Rule, is_integer


def sequence_length(value: Any) -> str | None:
    """Validates `max_seq_length`."""
    return None if is_integer(value, 1) else "must be a positive integer, the longest sequence in tokens"


def scaling(value: Any) -> str | None:
    """Validates `rope_scaling`."""
    fits = value is None or isinstance(value, Mapping)
    return None if fits else "must be a dict such as {'rope_type': 'linear', 'factor': 2.0}"


RULES: Mapping[str, Rule] = {"max_seq_length": sequence_length, "rope_scaling": scaling}
