"""Linears of one token without gradients, when decoding: matrix-vector kernels that read each weight once, in its storage format.

Per group of linears that read one input: one launch for all A @ x, if there is a LoRA, and one for everything else. Bias, LoRA delta,
residual and activation are added to the fp32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hasten.ops.glu.kernel import glu_fwd
from hasten.ops.lora.stacked import widths
from hasten.ops.matvec import Part, split_matvecs

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear

MAX_SPLITS, CHANNELS = 8, 1024
"""Programs per row of A, and input channels that each sums at least."""


def _run(
    x_E: torch.Tensor,
    linears: Sequence[LoraLinear],
    residual_O: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Runs linears whose weights are of one class. Returns (all O,), or (O,) of gate with an activation."""
    downs = [Part(one.a) for one in linears if one.a is not None]
    splits = min(MAX_SPLITS, 1 << max(0, (x_E.shape[0] // CHANNELS).bit_length() - 1))
    xa = split_matvecs(downs, x_E, splits, backend="triton") if downs else None
    parts = [Part(one.weight, one.bias, None if one.b is None else one.b.contiguous(), one.scale) for one in linears]
    return type(linears[0].weight).matvecs(parts, x_E, xa, residual_O, activation)


def _one_class(linears: Sequence[LoraLinear]) -> bool:
    return len({type(one.weight) for one in linears}) == 1


def lora_linears(
    x: torch.Tensor, linears: Sequence[LoraLinear], residual: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    flat = x.reshape(-1)
    if _one_class(linears):
        y = _run(flat, linears, None if residual is None else residual.reshape(-1))
        found = y.split(widths(linears))
    else:
        found = [_run(flat, [one]) for one in linears]
    return tuple(part.view(*x.shape[:-1], -1) for part in found)


def lora_mlp(
    x: torch.Tensor,
    linears: tuple[LoraLinear, LoraLinear, LoraLinear],
    activation: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    flat = x.reshape(-1)
    if _one_class(linears[:2]):
        h = _run(flat, linears[:2], activation=activation)
    else:
        gate, up = (_run(flat, [one])[None] for one in linears[:2])
        h = glu_fwd(gate, up, activation)[0]
    return _run(h, linears[2:], None if residual is None else residual.reshape(-1)).view(*x.shape[:-1], -1)
