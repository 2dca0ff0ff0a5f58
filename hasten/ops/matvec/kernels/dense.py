"""Linears of one token for dense matrices and for codes with a scale per channel: each weight is read once.

A program reads whole rows of a matrix into registers, all loads at once, and sums them in fp32. On an H100 a chain of the linears
of an 8B model reads 88% of the memory's bandwidth, cuBLAS (mv and mm) 80% (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device
from hasten.ops.matvec.kernels.epilogue import Epilogue, epilogue, finished, gated

if TYPE_CHECKING:
    from hasten.ops.matvec import Part

MAX_BLOCK = 16384
"""Weights of a row that are read at once."""
PER_PROGRAM = 8192
"""Weights that a program reads at once, of all its rows."""
PER_WARP = 1024
MAX_ROWS, MAX_WARPS = 8, 16
PROGRAMS = 264
"""Programs to start at least, two for each multiprocessor of an H100."""


@triton.jit
def _sums(
    matrix, addend, x_ptr, xa_ptr, row, lo, hi, ranks,
    SCALED: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W[row, lo:hi] @ x[lo:hi] in fp32, plus LoRA and bias. matrix: (weights, scales, rows, width, stride)."""
    w_ptr, scale_ptr, rows, _, stride = matrix
    inside = row < rows
    sums = tl.zeros([ROWS], tl.float32)
    for start in range(lo, hi, BLOCK):
        column = start + tl.arange(0, BLOCK)
        known = column < hi
        place = w_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
        w = tl.load(place, mask=inside[:, None] & known[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + column, mask=known, other=0.0)
        sums += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    if SCALED:
        sums *= tl.load(scale_ptr + row, mask=inside, other=0.0)
    return finished(sums, row, inside, addend, xa_ptr, ranks, BIAS, SPLITS, RANKS)


@triton.jit
def _linears(
    matrices, addends, x_ptr, xa_ptr, residual_ptr, y_ptr, ranks, total, chunk,
    SCALED: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0), tl.program_id(1)
    first, offset = 0, 0
    for i in tl.static_range(len(matrices)):
        rows = matrices[i][2]
        count = tl.cdiv(rows, ROWS)
        if (program >= first) & (program < first + count):
            row = (program - first) * ROWS + tl.arange(0, ROWS)
            lo = split * chunk
            hi = tl.minimum(lo + chunk, matrices[i][3])
            sums = _sums(
                matrices[i], addends[i], x_ptr, xa_ptr, row, lo, hi, ranks, SCALED, BIAS, SPLITS, RANKS, ROWS, BLOCK
            )
            if RESIDUAL:
                sums += tl.load(residual_ptr + offset + row, mask=row < rows, other=0.0).to(tl.float32)
            tl.store(y_ptr + split * total + offset + row, sums.to(y_ptr.dtype.element_ty), mask=row < rows)
        first += count
        offset += rows


@triton.jit
def _gated(
    matrices, addends, x_ptr, xa_ptr, y_ptr, ranks,
    SCALED: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, CODE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = matrices[0][3]
    gate = _sums(matrices[0], addends[0], x_ptr, xa_ptr, row, 0, width, ranks, SCALED, BIAS, SPLITS, RANKS, ROWS, BLOCK)
    up = _sums(matrices[1], addends[1], x_ptr, xa_ptr, row, 0, width, ranks, SCALED, BIAS, SPLITS, RANKS, ROWS, BLOCK)
    y = gated(gate, up, x_ptr.dtype.element_ty, CODE)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < matrices[0][2])


def _matrix(weight: Any) -> tuple[Any, ...]:
    if isinstance(weight, torch.Tensor):
        return weight, weight, *weight.shape, weight.stride(0)
    return weight.codes, weight.scales, *weight.shape, weight.codes.stride(0)


def _shape(rows: int, width: int) -> dict[str, int]:
    """Rows per program, block and warps for `rows` output channels in all and `width` input channels per program."""
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(width)))
    count = min(MAX_ROWS, max(1, PER_PROGRAM // block))
    while count > 1 and rows // count < PROGRAMS:
        count //= 2
    warps = max(1, min(MAX_WARPS, count * block // PER_WARP))
    return {"ROWS": count, "BLOCK": block, "num_warps": warps}


def matvecs(  # noqa: PLR0917
    parts: Sequence[Part[Any]],
    x_E: torch.Tensor,
    xa_SR: torch.Tensor | None,
    residual_O: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    ends: Epilogue = epilogue(parts, x_E, xa_SR, residual_O, activation, dtype)
    _launch(parts, x_E, ends, activation, 1)
    return ends.y


def split_matvecs(parts: Sequence[Part[Any]], x_E: torch.Tensor, splits: int) -> torch.Tensor:
    ends: Epilogue = epilogue(parts, x_E, None, None, None, torch.float32, splits)
    _launch(parts, x_E, ends, None, splits)
    return ends.y


def _launch(parts: Sequence[Part[Any]], x_E: torch.Tensor, ends: Epilogue, activation: str | None, splits: int) -> None:
    matrices = tuple(_matrix(part.weight) for part in parts)
    rows, chunk = ends.y.shape[-1], triton.cdiv(x_E.shape[0], splits)
    shape = _shape(rows, chunk)
    scaled = not isinstance(parts[0].weight, torch.Tensor)
    with on_device(x_E):
        if activation is not None:
            grid = (triton.cdiv(rows, shape["ROWS"]),)
            _gated[grid](matrices, ends.addends, x_E, ends.xa, ends.y, ends.ranks, SCALED=scaled, **ends.meta, **shape)
        else:
            grid = (sum(triton.cdiv(part.weight.shape[0], shape["ROWS"]) for part in parts), splits)
            _linears[grid](
                matrices, ends.addends, x_E, ends.xa, ends.residual, ends.y, ends.ranks, rows, chunk,
                SCALED=scaled, **ends.meta, **shape,
            )  # fmt: skip
