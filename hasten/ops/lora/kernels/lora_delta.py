"""The LoRA delta xa @ b, forward and backward, with one pass over the tensor of the output's size.

Forward: writes base + xa @ b, onto which the base matmul then accumulates (addmm, beta = 1).
Backward: computes d_xa = dy @ b.T and d_b = dy.T @ xa from one read of dy. A program owns a strip of columns and walks
down the rows: d_b is summed in registers, the partial d_xa of each strip is stored in fp32. Partial sums are added
afterwards in a fixed order, so results are deterministic.

N tokens (rows), F output channels (columns), R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device, shared_memory

MAX_RANK = 128
"""Largest rank of the forward kernel, which holds all ranks in one tile; cuBLAS runs larger ones."""
MAX_RANK_BACKWARD = 32
"""Largest rank at which the backward kernel is faster than two cuBLAS matmuls."""
MIN_WIDTH_BACKWARD = 2048
"""Output channels below which two cuBLAS matmuls are faster than the backward kernel."""
TILE = {"ROWS": 64, "COLS": 256, "num_warps": 4, "num_stages": 3}
"""Launch of the backward kernel: tokens x output channels per tile."""
SMALL_TILE = {"ROWS": 32, "COLS": 128, "num_warps": 4, "num_stages": 2}
"""The same where a thread block has 64 KiB of shared memory (T4)."""


@triton.jit
def load_tile(ptr, rows, cols, stride, rows_end, cols_end):
    """Loads a (rows, cols) tile of a matrix with contiguous columns; zeros beyond its ends."""
    mask = (rows < rows_end)[:, None] & (cols < cols_end)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def dot(left, right, UPCAST: tl.constexpr):
    """Computes left @ right, accumulated in fp32. UPCAST: set in Triton's interpreter, whose 16-bit dot is wrong."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit(do_not_specialize=["N", "ROWS_EACH"])
def _lora_delta_bwd(
    dy_ptr, xa_ptr, b_ptr, strips_ptr, sums_ptr, stride_dy, stride_xa, stride_b, N, F, R, ROWS_EACH,
    BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    strip, split = tl.program_id(0), tl.program_id(1)
    cols = strip * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, BLOCK_R)
    b_cols = load_tile(b_ptr, ranks, cols, stride_b, R, F)
    total = tl.zeros((COLS, BLOCK_R), dtype=tl.float32)
    first = split.to(tl.int64) * ROWS_EACH
    for start in range(0, ROWS_EACH, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        dy = load_tile(dy_ptr, rows, cols, stride_dy, N, F)
        xa = load_tile(xa_ptr, rows, ranks, stride_xa, N, R)
        total += dot(tl.trans(dy), xa, UPCAST)
        part = strips_ptr + (strip.to(tl.int64) * N + rows[:, None]) * BLOCK_R + ranks[None, :]
        tl.store(part, dot(dy, tl.trans(b_cols), UPCAST), mask=(rows < N)[:, None] & (ranks >= 0)[None, :])
    at = sums_ptr + (split.to(tl.int64) * F + cols[:, None]) * BLOCK_R + ranks[None, :]
    tl.store(at, total, mask=(cols < F)[:, None] & (ranks >= 0)[None, :])


@triton.jit(do_not_specialize=["N"])
def _add_lora_delta(
    base_ptr, xa_ptr, b_ptr, out_ptr, stride_base, stride_xa, stride_b, stride_out, N, F, R,
    BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, COLS)  # one grid axis: the other axes are limited to 65535 programs
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, BLOCK_R)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    base = tl.load(base_ptr + rows[:, None] * stride_base + cols[None, :], mask=mask, other=0.0)
    xa = load_tile(xa_ptr, rows, ranks, stride_xa, N, R)
    b = load_tile(b_ptr, ranks, cols, stride_b, R, F)
    out = base.to(tl.float32) + dot(xa, b, UPCAST)
    tl.store(out_ptr + rows[:, None] * stride_out + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def rank_block(rank: int) -> int:
    """Returns the power of two that a rank is padded to, at least 16 (the least that tensor cores take)."""
    return max(16, triton.next_power_of_2(rank))


def add_lora_delta(
    base_NF: torch.Tensor, xa_NR: torch.Tensor, b_RF: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes base + xa @ b (N, F) in base's dtype, written into `out` or a new tensor.

    Columns must be contiguous; base may be one expanded row (a bias). R <= MAX_RANK.
    """
    rows, width = base_NF.shape
    if out is None:
        out = torch.empty(rows, width, device=base_NF.device, dtype=base_NF.dtype)
    tile = {"ROWS": 16, "COLS": 128}
    grid = (triton.cdiv(width, tile["COLS"]) * triton.cdiv(rows, tile["ROWS"]),)
    if not rows:
        return out
    with on_device(out):
        _add_lora_delta[grid](
            base_NF, xa_NR, b_RF, out, base_NF.stride(0), xa_NR.stride(0), b_RF.stride(0), out.stride(0),
            rows, width, xa_NR.shape[1], BLOCK_R=rank_block(xa_NR.shape[1]), UPCAST=not out.is_cuda, num_warps=4, **tile,
        )  # fmt: skip
    return out


def lora_delta_bwd(
    dy_NF: torch.Tensor,
    xa_NR: torch.Tensor,
    b_RF: torch.Tensor,
    tile: dict[str, int] | None = None,
    splits: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes (dy @ b.T (N, R), dy.T @ xa (F, R)), both fp32. Columns must be contiguous; N >= 1.

    tile: the launch, None = by the GPU's shared memory. splits: programs that the tokens are divided among.
    """
    rows, width = dy_NF.shape
    block = rank_block(xa_NR.shape[1])
    tile = (TILE if shared_memory(dy_NF.device) >= 96 * 2**10 else SMALL_TILE) if tile is None else tile
    each = triton.cdiv(triton.cdiv(rows, splits), tile["ROWS"]) * tile["ROWS"]
    splits, strips = triton.cdiv(rows, each), triton.cdiv(width, tile["COLS"])
    parts = torch.empty(strips, rows, block, device=dy_NF.device, dtype=torch.float32)
    sums = torch.empty(splits, width, block, device=dy_NF.device, dtype=torch.float32)
    with on_device(dy_NF):
        _lora_delta_bwd[(strips, splits)](
            dy_NF, xa_NR, b_RF, parts, sums, dy_NF.stride(0), xa_NR.stride(0), b_RF.stride(0), rows, width, xa_NR.shape[1], each,
            BLOCK_R=block, UPCAST=not dy_NF.is_cuda, **tile,
        )  # fmt: skip
    rank = xa_NR.shape[1]
    return parts.sum(0)[:, :rank], sums.sum(0)[:, :rank]
