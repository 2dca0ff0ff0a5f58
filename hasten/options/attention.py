"""The attention backend. Whether the model has it is checked by `hasten.loading.checks`."""

from collections.abc import Mapping
from typing import Any

from hasten.options.values import Rule


def backend_name(value: Any) -> str | None:
    """Validates `attn_implementation`."""
    fits = value is None or isinstance(value, str)
    return None if fits else "must be a name such as 'sdpa', 'eager' or 'flash_attention_2'"


RULES: Mapping[str, Rule] = {"attn_implementation": backend_name}
