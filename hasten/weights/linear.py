"""Dequantises, compares, measures and describes the weight of a Linear in any format."""

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
    """Returns whether storing `dense` (out, in) in the layer's format gives its weight, i.e. the weight has not
    changed.

    A dense weight must equal `dense` cast to its dtype, bit for bit; of quantised ones the codes are compared.
    """
    return format_of(linear).holds(linear, dense)


def linear_bytes(linear: Any) -> int:
    """Returns the bytes of the stored weight, its scales and the bias; for an unknown format, of all tensors of the
    module."""
    found = find_format(linear)
    if found is None:
        return tensor_bytes(*linear.parameters(), *linear.buffers())
    bias = [] if linear.bias is None else [linear.bias]
    return found.stored_bytes(linear) + tensor_bytes(*bias)


def label_of(module: nn.Module) -> str:
    """Names the storage of a Linear (with or without PEFT's wrapper) for a report: the format's name, the dtype of a
    dense weight, else the class of the module."""
    base: Any = base_layer_of(module)
    found = find_format(base) if isinstance(base, nn.Linear) else None
    if found is None:
        return type(base).__name__
    return str(base.weight.dtype).removeprefix("torch.") if found.exact else found.name
