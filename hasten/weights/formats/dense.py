"""A floating-point matrix, stored as it is."""

from typing import Any

import torch
from torch import nn

from hasten.ops.lora import DenseWeight, Weight
from hasten.weights.formats.base import WeightFormat, tensor_bytes
from hasten.weights.own_forward import runs_forward_of


class Dense(WeightFormat):
    name = "dense"
    load_argument = "load_in_16bit"
    choice = "16bit"
    exact = True
    trainable = True

    def matches(self, linear: nn.Module) -> bool:
        """Matches any floating-point weight, also that of an embedding. Quantised formats are tried first, since some
        of them have one too."""
        weight = getattr(linear, "weight", None)
        return isinstance(weight, torch.Tensor) and weight.is_floating_point()

    def weight(self, linear: Any) -> Weight | str:
        kind = type(linear)
        # An overlay over a Linear computes the same: it differs only in where it rounds.
        if kind is not nn.Linear and getattr(kind, "stock_class", kind) is not nn.Linear:
            return f"stored as {kind.__name__}"
        if not runs_forward_of(nn.Linear, ("torch",)):
            return "nn.Linear.forward was replaced"
        weight = linear.weight
        if type(weight) is not nn.Parameter:  # e.g. a sharded DTensor
            return f"stored as {type(weight).__name__}"
        return DenseWeight(weight)

    def dequantize(self, linear: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the weight itself where the dtype is right, not a copy. None = its own dtype."""
        weight: torch.Tensor = linear.weight
        dense = weight if weight.requires_grad else weight.detach()
        return dense if dtype is None else dense.to(dtype)

    def holds(self, linear: Any, dense: torch.Tensor) -> bool:
        """Returns whether the weight equals `dense` cast to its dtype, bit for bit."""
        weight: torch.Tensor = linear.weight
        return tuple(weight.shape) == tuple(dense.shape) and torch.equal(dense.to(weight.device, weight.dtype), weight)

    def stored_bytes(self, linear: Any) -> int:
        return tensor_bytes(linear.weight)

    def bytes_for(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns * itemsize
