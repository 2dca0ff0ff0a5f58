"""Linears of one token in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hasten.ops.glu import ACTIVATIONS
from hasten.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from hasten.ops.matvec import Part


def product(weight: Any, x_E: torch.Tensor) -> torch.Tensor:
    """Returns W @ x in fp32, or fp64 for an x in fp64, for a tensor or a `ScaledMatrix`."""
    x = at_least_fp32(x_E)
    if isinstance(weight, torch.Tensor):
        return torch.mv(weight.to(x.dtype), x)
    return torch.mv(weight.codes.to(x.dtype), x) * weight.scales


def finish(  # noqa: PLR0917
    products: Sequence[torch.Tensor],
    parts: Sequence[Part[Any]],
    xa_SR: torch.Tensor | None,
    residual_O: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    rounded: torch.dtype,
) -> torch.Tensor:
    """Adds biases, LoRAs and residual to the fp32 products, or applies the activation to gate and up, as rounded to `rounded`."""
    found, rank = [], 0
    for total, part in zip(products, parts, strict=True):
        if part.b is not None and xa_SR is not None:
            total = total + part.scale * torch.mv(part.b.to(xa_SR.dtype), xa_SR[:, rank : rank + part.rank].sum(0))
            rank += part.rank
        found.append(total if part.bias is None else total + part.bias)
    if activation is not None:
        gate, up = (one.to(rounded) for one in found)
        return (ACTIVATIONS[activation](gate) * up).to(dtype)
    y = torch.cat(found)
    return (y if residual_O is None else y + residual_O).to(dtype)
