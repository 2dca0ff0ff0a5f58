"""act(gate + share) * (up + share) with LoRA's shares added in registers, and its backward.

Bytes, forward: gate and up read, product written. Backward: the product's gradient, gate and up read, the gradients of gate
and up written. Nothing else of that size: the product's own share of the gradient (d_pa @ a_down), the gradients of B of gate
and up and of A of down, and the gradients of both x @ A.T come out of the tiles that are in registers anyway. Programs own a
strip of columns and walk down the rows; what is summed over rows stays in registers, what is summed over columns is written
per strip and added up afterwards, in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hasten.ops.glu.kernel import CODES, activate
from hasten.ops.lora.share.kernel import load_tile, rank_block, thin_dot

MAX_RANK = 64  # beyond, the sums over rows no longer fit in registers


@triton.jit
def _lora_glu_fwd(
    gate_ptr, up_ptr, xg_ptr, xu_ptr, bg_ptr, bu_ptr, out_ptr,
    stride_gate, stride_up, stride_xg, stride_xu, N, F, RG, RU,
    CODE: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, BLOCK_R)
    xg, bg = load_tile(xg_ptr, rows, ranks, stride_xg, N, RG), load_tile(bg_ptr, ranks, cols, F, RG, F)
    xu, bu = load_tile(xu_ptr, rows, ranks, stride_xu, N, RU), load_tile(bu_ptr, ranks, cols, F, RU, F)
    gate = load_tile(gate_ptr, rows, cols, stride_gate, N, F).to(tl.float32) + thin_dot(xg, bg, UPCAST)
    up = load_tile(up_ptr, rows, cols, stride_up, N, F).to(tl.float32) + thin_dot(xu, bu, UPCAST)
    act, _ = activate(gate, CODE)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    tl.store(out_ptr + rows[:, None] * F + cols[None, :], (act * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lora_glu_bwd(
    d_ptr, gate_ptr, up_ptr, xg_ptr, xu_ptr, dp_ptr, bg_ptr, bu_ptr, ad_ptr, strips_ptr, sums_ptr,
    stride_d, stride_gate, stride_up, stride_xg, stride_xu, stride_dp, N, F, RG, RU, RD, ROWS_EACH,
    CODE: tl.constexpr, DOWN: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    strip, split = tl.program_id(0), tl.program_id(1)
    cols = strip * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, BLOCK_R)
    kind = gate_ptr.dtype.element_ty
    bg, bu = load_tile(bg_ptr, ranks, cols, F, RG, F), load_tile(bu_ptr, ranks, cols, F, RU, F)
    sum_g = tl.zeros((BLOCK_R, COLS), dtype=tl.float32)
    sum_u = tl.zeros((BLOCK_R, COLS), dtype=tl.float32)
    sum_d = tl.zeros((BLOCK_R, COLS), dtype=tl.float32)
    first = split.to(tl.int64) * ROWS_EACH
    for start in range(0, ROWS_EACH, ROWS):
        rows = first + start + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (cols < F)[None, :]
        xg, xu = load_tile(xg_ptr, rows, ranks, stride_xg, N, RG), load_tile(xu_ptr, rows, ranks, stride_xu, N, RU)
        gate_at = gate_ptr + rows[:, None] * stride_gate + cols[None, :]
        up_at = up_ptr + rows[:, None] * stride_up + cols[None, :]
        gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32) + thin_dot(xg, bg, UPCAST)
        up = tl.load(up_at, mask=mask, other=0.0).to(tl.float32) + thin_dot(xu, bu, UPCAST)
        d = load_tile(d_ptr, rows, cols, stride_d, N, F).to(tl.float32)
        act, slope = activate(gate, CODE)
        if DOWN:
            dp = load_tile(dp_ptr, rows, ranks, stride_dp, N, RD)
            d += thin_dot(dp, load_tile(ad_ptr, ranks, cols, F, RD, F), UPCAST)
            sum_d += thin_dot(tl.trans(dp), (act * up).to(kind), UPCAST)
        d_gate, d_up = (d * up * slope).to(kind), (d * act).to(kind)
        tl.store(gate_at, d_gate, mask=mask)
        tl.store(up_at, d_up, mask=mask)
        sum_g += thin_dot(tl.trans(xg), d_gate, UPCAST)
        sum_u += thin_dot(tl.trans(xu), d_up, UPCAST)
        part = strips_ptr + ((strip * 2).to(tl.int64) * N + rows[:, None]) * BLOCK_R + ranks[None, :]
        in_rows = (rows < N)[:, None] & (ranks >= 0)[None, :]
        tl.store(part, thin_dot(d_gate, tl.trans(bg), UPCAST), mask=in_rows)
        tl.store(part + N * BLOCK_R, thin_dot(d_up, tl.trans(bu), UPCAST), mask=in_rows)
    at = sums_ptr + split.to(tl.int64) * 3 * BLOCK_R * F + ranks[:, None] * F + cols[None, :]
    in_cols = (ranks >= 0)[:, None] & (cols < F)[None, :]
    tl.store(at, sum_g, mask=in_cols)
    tl.store(at + BLOCK_R * F, sum_u, mask=in_cols)
    if DOWN:
        tl.store(at + 2 * BLOCK_R * F, sum_d, mask=in_cols)


@dataclass(frozen=True)
class Share:
    """xa (N, R) and b (R, F), scaled: what xa @ b adds to a base product."""

    xa: torch.Tensor
    b: torch.Tensor


def lora_glu_fwd(gate_NF: torch.Tensor, up_NF: torch.Tensor, gate: Share, up: Share, activation: str) -> torch.Tensor:
    """act(gate + its share) * (up + its share), a new (N, F). Columns are contiguous everywhere."""
    rows, width = gate_NF.shape
    out = torch.empty(rows, width, device=gate_NF.device, dtype=gate_NF.dtype)
    tile = {"ROWS": 16, "COLS": 128}  # the fastest of 14 on an H200: see docs/log.md
    grid = (triton.cdiv(width, tile["COLS"]), triton.cdiv(rows, tile["ROWS"]))
    if rows:
        _lora_glu_fwd[grid](
            gate_NF, up_NF, gate.xa, up.xa, gate.b, up.b, out, gate_NF.stride(0), up_NF.stride(0),
            gate.xa.stride(0), up.xa.stride(0), rows, width, gate.xa.shape[1], up.xa.shape[1], CODE=CODES[activation],
            BLOCK_R=rank_block(max(gate.xa.shape[1], up.xa.shape[1])), UPCAST=not out.is_cuda, num_warps=4, **tile,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class ThinGradients:
    """xa_gate (N, R), xa_up (N, R): in the tiles' dtype, for B's already scaled. b_gate, b_up, a_down (R, F): fp32, B's unscaled."""

    xa_gate: torch.Tensor
    xa_up: torch.Tensor
    b_gate: torch.Tensor
    b_up: torch.Tensor
    a_down: torch.Tensor | None


def _tile(block_r: int) -> dict[str, int]:
    if block_r <= 16:
        return {"ROWS": 32, "COLS": 128, "num_warps": 8, "num_stages": 2}
    return {"ROWS": 16, "COLS": 128 if block_r <= 32 else 64, "num_warps": 8, "num_stages": 2}


def lora_glu_bwd(  # noqa: PLR0913
    d_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    gate: Share,
    up: Share,
    down: Share | None,
    activation: str,
    tile: dict[str, int] | None = None,
    splits: int = 8,
) -> ThinGradients:
    """Writes the gradients of gate and up over gate_NF and up_NF, and returns all that is summed from them.

    d: the product's gradient, less down's share of it, which is down.xa (the gradient of product @ A.T) @ down.b (A itself).
    """
    rows, width = gate_NF.shape
    ranks = [gate.xa.shape[1], up.xa.shape[1], 0 if down is None else down.xa.shape[1]]
    block = rank_block(max(ranks))
    tile = _tile(block) if tile is None else tile
    splits = min(splits, triton.cdiv(rows, tile["ROWS"])) or 1
    each = triton.cdiv(triton.cdiv(rows, splits), tile["ROWS"]) * tile["ROWS"]
    strips = triton.cdiv(width, tile["COLS"])
    parts = torch.empty(strips, 2, rows, block, device=d_NF.device, dtype=torch.float32)
    sums = torch.empty(splits, 3, block, width, device=d_NF.device, dtype=torch.float32)
    dp, a_down = (gate.xa, gate.b) if down is None else (down.xa, down.b)
    _lora_glu_bwd[(strips, splits)](
        d_NF, gate_NF, up_NF, gate.xa, up.xa, dp, gate.b, up.b, a_down, parts, sums,
        d_NF.stride(0), gate_NF.stride(0), up_NF.stride(0), gate.xa.stride(0), up.xa.stride(0), dp.stride(0),
        rows, width, *ranks, each, CODE=CODES[activation], DOWN=down is not None, BLOCK_R=block,
        UPCAST=not d_NF.is_cuda, **tile,
    )  # fmt: skip
    xa_gate, xa_up = parts.sum(0).to(gate_NF.dtype)
    b_gate, b_up, d_down = sums.sum(0)
    return ThinGradients(
        xa_gate[:, : ranks[0]], xa_up[:, : ranks[1]], b_gate[: ranks[0]], b_up[: ranks[1]],
        None if down is None else d_down[: ranks[2]],
    )  # fmt: skip
