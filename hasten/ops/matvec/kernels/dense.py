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
def _sums(matrix, x_ptr, row, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """W[row] @ x in fp32. matrix: (weights, scales, rows, width, stride)."""
    w_ptr, scale_ptr, rows, width, stride = matrix
    inside = row < rows
    sums = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        known = column < width
        place = w_ptr + row.to(tl.int64)[:, None] * stride + column[None, :]
        w = tl.load(place, mask=inside[:, None] & known[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + column, mask=known, other=0.0)
        sums += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    if SCALED:
        sums *= tl.load(scale_ptr + row, mask=inside, other=0.0)
    return sums


@triton.jit
def _linears(
    matrices, addends, x_ptr, xa_ptr, residual_ptr, y_ptr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, RANKS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first, offset = 0, 0
    for i in tl.static_range(len(matrices)):
        rows = matrices[i][2]
        count = tl.cdiv(rows, ROWS)
        if (program >= first) & (program < first + count):
            row = (program - first) * ROWS + tl.arange(0, ROWS)
            inside = row < rows
            sums = _sums(matrices[i], x_ptr, row, SCALED, ROWS, BLOCK)
            sums = finished(sums, row, inside, addends[i], xa_ptr, BIAS, RANKS)
            if RESIDUAL:
                sums += tl.load(residual_ptr + offset + row, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + offset + row, sums.to(y_ptr.dtype.element_ty), mask=inside)
        first += count
        offset += rows


@triton.jit
def _gated(
    matrices, addends, x_ptr, xa_ptr, y_ptr,
    SCALED: tl.constexpr, BIAS: tl.constexpr, RANKS: tl.constexpr, CODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < matrices[0][2]
    gate = _sums(matrices[0], x_ptr, row, SCALED, ROWS, BLOCK)
    up = _sums(matrices[1], x_ptr, row, SCALED, ROWS, BLOCK)
    gate = finished(gate, row, inside, addends[0], xa_ptr, BIAS, RANKS)
    up = finished(up, row, inside, addends[1], xa_ptr, BIAS, RANKS)
    y = gated(gate, up, x_ptr.dtype.element_ty, CODE)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=inside)


def _matrix(weight: Any) -> tuple[Any, ...]:
    if isinstance(weight, torch.Tensor):
        return weight, weight, *weight.shape, weight.stride(0)
    return weight.codes, weight.scales, *weight.shape, weight.codes.stride(0)


def _shape(rows: int, width: int) -> dict[str, int]:
    """Rows per program, block and warps for `rows` output channels in all."""
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(width)))
    count = min(MAX_ROWS, max(1, PER_PROGRAM // block))
    while count > 1 and rows // count < PROGRAMS:
        count //= 2
    warps = max(1, min(MAX_WARPS, count * block // PER_WARP))
    return {"ROWS": count, "BLOCK": block, "num_warps": warps}


def matvecs(  # noqa: PLR0917
    parts: Sequence[Part[Any]],
    x_E: torch.Tensor,
    xa_R: torch.Tensor | None,
    residual_O: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    ends: Epilogue = epilogue(parts, x_E, xa_R, residual_O, activation, dtype)
    matrices = tuple(_matrix(part.weight) for part in parts)
    shape = _shape(ends.y.shape[0], x_E.shape[0])
    scaled = not isinstance(parts[0].weight, torch.Tensor)
    with on_device(x_E):
        if activation is not None:
            grid = (triton.cdiv(ends.y.shape[0], shape["ROWS"]),)
            _gated[grid](matrices, ends.addends, x_E, ends.xa, ends.y, SCALED=scaled, **ends.meta, **shape)
        else:
            grid = (sum(triton.cdiv(part.weight.shape[0], shape["ROWS"]) for part in parts),)
            _linears[grid](
                matrices, ends.addends, x_E, ends.xa, ends.residual, ends.y, SCALED=scaled, **ends.meta, **shape
            )
    return ends.y
