"""A Linear's weight in words and as a matrix, whatever its format."""

from typing import Any

import torch
from torch import nn

from hasten.weights.formats import find_format, format_of
from hasten.weights.formats.base import tensor_bytes
from hasten.weights.peft_layers import base_layer_of


def dequantize(linear: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns the weight as an (out, in) matrix of `dtype`; None = its own dtype if dense, the compute dtype if
    quantised.

    A dense weight of the right dtype is returned itself, not copied. Raises TypeError for an unknown format.
    """
    return format_of(linear).dequantize(linear, dtype)


def holds(linear: nn.Module, dense: torch.Tensor) -> bool:
    """Returns whether storing `dense` (out, in) in the layer's format gives its weight, i.e. the weight did not change
    since.

    A dense weight must equal `dense` cast to its dtype, bit for bit; of quantised ones the codes are compared.
    """
    return format_of(linear).holds(linear, dense)


def linear_bytes(linear: Any) -> int:
    """Returns the bytes of the stored weight, its scales and the bias; of a format that hasten does not know, of what
    the module holds."""
    found = find_format(linear)
    if found is None:
        return tensor_bytes(*linear.parameters(), *linear.buffers())
    bias = [] if linear.bias is None else [linear.bias]
    return found.stored_bytes(linear) + tensor_bytes(*bias)


def label_of(module: nn.Module) -> str:
    """How a report names the storage of a Linear, under PEFT or not: the format's name, the dtype of a dense weight, the
    class of what is not a Linear or is in no known format."""
    base: Any = base_layer_of(module)
    found = find_format(base) if isinstance(base, nn.Linear) else None
    if found is None:
        return type(base).__name__
    return str(base.weight.dtype).removeprefix("torch.") if found.exact else found.name
