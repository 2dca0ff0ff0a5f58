"""Old names of `reader` and `packing`, for callers that have not moved to them yet."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from hasten.ops.lora import LoraLinear
from hasten.weights import reader
from hasten.weights.packing import is_packed
from hasten.weights.peft_layers import LoraPair, base_layer_of


def plain_linear(module: Any, training: bool) -> tuple[LoraLinear | None, str | None]:
    """`reader.read_linear` as (linear, None) or (None, reason)."""
    found = reader.read_linear(module, training)
    return (None, found) if isinstance(found, str) else (found, None)


def read_linear(module: Any, training: bool) -> tuple[nn.Linear | None, LoraPair | None, str | None]:
    """`reader.read_head` as (base Linear, LoRA or None, None) or (None, None, reason)."""
    found = reader.read_head(module, training)
    if isinstance(found, str):
        return None, None, found
    pair = None if found.a is None or found.b is None else LoraPair(found.a, found.b, found.scale)
    return base_layer_of(module), pair, None  # pyright: ignore[reportReturnType]


def lie_apart(modules: Sequence[Any]) -> bool:
    """`not is_packed`."""
    return not is_packed(modules)
