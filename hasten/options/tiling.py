"""Checks the tiled MLP (`unsloth_tiled_mlp`)."""

from collections.abc import Mapping
from typing import Any

from hasten.options.values import Rule, is_integer

MIN_TILE = 16
"""Tokens: the smallest tile that the kernels' matmuls take."""


def tile(value: Any) -> str | None:
    """Validates `unsloth_tiled_mlp`."""
    if isinstance(value, bool) or value == "auto" or is_integer(value, MIN_TILE):
        return None
    return f"must be False, True, 'auto' or an integer of at least {MIN_TILE}, the number of tokens per tile"


RULES: Mapping[str, Rule] = {"unsloth_tiled_mlp": tile}
