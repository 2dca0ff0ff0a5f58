"""What every matrix-vector kernel does with the sums of its output channels, whatever the weights' storage format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hasten.ops.glu.kernel import CODES, activate

if TYPE_CHECKING:
    from hasten.ops.matvec import Part


@triton.jit
def finished(sums, row, inside, addend, xa_ptr, ranks, BIAS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr):
    """Adds bias and scale * b @ xa to the sums of `row`.

    addend: (bias, its length or 0, b, its rank or 0, scale, first entry of xa). ranks: of all linears together. RANKS: a power of two
    from every rank on, 0 = no LoRA; a loop over ranks would cost more than the LoRA itself.
    """
    bias_ptr, length, b_ptr, rank, scale, first = addend
    if RANKS > 0:
        r = tl.arange(0, RANKS)
        known = r < rank
        xa = tl.zeros([RANKS], tl.float32)
        for split in tl.static_range(SPLITS):
            xa += tl.load(xa_ptr + split * ranks + first + r, mask=known, other=0.0)
        place = b_ptr + row.to(tl.int64)[:, None] * rank + r[None, :]
        b = tl.load(place, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
        sums += scale * tl.sum(b * xa[None, :], 1)
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=inside & (row < length), other=0.0).to(tl.float32)
    return sums


@triton.jit
def gated(gate, up, kind: tl.constexpr, CODE: tl.constexpr):
    """act(gate) * up, with gate, up and act(gate) rounded to `kind`, as three separate ops would."""
    act, _ = activate(gate.to(kind).to(tl.float32), CODE)
    return act.to(kind).to(tl.float32) * up.to(kind).to(tl.float32)


@dataclass(frozen=True)
class Epilogue:
    """The arguments of `finished` and of the store. y: (all O,), or (O,) of gate with an activation."""

    y: torch.Tensor
    xa: torch.Tensor
    ranks: int
    residual: torch.Tensor
    addends: tuple[tuple[Any, ...], ...]
    meta: dict[str, Any]


def epilogue(  # noqa: PLR0917
    parts: Sequence[Part[Any]],
    x_E: torch.Tensor,
    xa_SR: torch.Tensor | None,
    residual_O: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    splits: int | None = None,
) -> Epilogue:
    """Prepares one launch over `parts`. An absent tensor is passed as x, with a length of 0. splits: of the input channels, each with
    a row of y of its own."""
    rows = [part.weight.shape[0] for part in parts]
    y = torch.empty(rows[0] if activation else sum(rows), device=x_E.device, dtype=dtype)
    y = y if splits is None else y.new_empty(splits, sum(rows))
    addends, first = [], 0
    for part in parts:
        bias, b = (x_E if tensor is None else tensor for tensor in (part.bias, part.b))
        addends.append((bias, 0 if part.bias is None else rows[len(addends)], b, part.rank, part.scale, first))
        first += part.rank
    meta = {
        "BIAS": any(part.bias is not None for part in parts),
        "RANKS": 0 if xa_SR is None else triton.next_power_of_2(max(part.rank for part in parts)),
        "SPLITS": 1 if xa_SR is None else xa_SR.shape[0],
    }
    if activation is None:
        meta["RESIDUAL"] = residual_O is not None
    else:
        meta["CODE"] = CODES[activation]
    xa, residual = (x_E if tensor is None else tensor for tensor in (xa_SR, residual_O))
    return Epilogue(y, xa, first, residual, tuple(addends), meta)
