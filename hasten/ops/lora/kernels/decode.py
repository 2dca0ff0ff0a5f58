"""Linears with LoRA for one token without gradients: matrix-vector products, which read each weight once.

A weight in a packed format is not dequantised first. Adapters are applied without merging them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hasten.ops.lora.stacked import stacked_view, widths
from hasten.ops.matvec import matvec

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear


def is_one_token(x: torch.Tensor) -> bool:
    """Returns whether x (..., E) is a single token that needs no gradient."""
    return not torch.is_grad_enabled() and x.numel() == x.shape[-1]


def linears_of_one_token(
    x_E: torch.Tensor, linears: Sequence[LoraLinear], residual_O: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Returns the output (O_i,) of each linear. residual: added to the output of a single linear."""
    packed = stacked_view([one.weight.stored for one in linears]) if len(linears) > 1 else None
    if packed is not None:
        outputs = list(matvec(packed, x_E).split(widths(linears)))
    else:
        outputs = [one.weight.matvec(x_E) for one in linears]
    for y, one in zip(outputs, linears, strict=True):
        if one.bias is not None:
            y.add_(one.bias)
        if one.a is not None and one.b is not None:
            y.add_(matvec(one.b, matvec(one.a, x_E)), alpha=one.scale)
    if residual_O is not None:
        outputs[0].add_(residual_O)
    return outputs
