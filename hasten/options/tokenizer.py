"""Checks the size of the vocabulary (`resize_model_vocab`). Whether the tokenizer fits into it is checked by
`hasten.loading.checks`."""

from collections.abc import Mapping
from typing import Any

from hasten.options.values import Rule, is_integer


def vocabulary_size(value: Any) -> str | None:
    """Validates `resize_model_vocab`."""
    return (
        None if value is None or is_integer(value, 1) else "must be None or a positive integer, the vocabulary's size"
    )


RULES: Mapping[str, Rule] = {"resize_model_vocab": vocabulary_size}
