"""Fuses the q/k norm and the rotary embedding of q and k into one launch, forward and backward.

One program takes one token and a block of heads, of q or of k, and reads the token's cos and sin once per block.
Memory traffic: the forward reads and writes q and k once; the backward reads the gradients (with a norm also q and k)
and writes once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device
from hasten.ops.norm import NormConfig


@triton.jit
def _load_tables(cos_ptr, sin_ptr, token, T, stride_table, i, half_mask, D, INTERLEAVED: tl.constexpr):
    """Loads cos and sin of each pair of channels; both channels of a pair have the same angle."""
    step: tl.constexpr = 2 if INTERLEAVED else 1
    row = (token // T) * stride_table + (token % T) * D
    cos = tl.load(cos_ptr + row + i * step, mask=half_mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row + i * step, mask=half_mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _load_pairs(base, row_mask, D, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Loads both channels of each pair, (HEADS, HALF) each. Interleaved pairs are one contiguous load, then split."""
    i = tl.arange(0, HALF)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF)
        x = tl.load(base + cols[None, :], mask=row_mask[:, None] & (cols < D)[None, :], other=0.0)
        return tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    else:
        mask = row_mask[:, None] & (i < D // 2)[None, :]
        return (
            tl.load(base + i[None, :], mask=mask, other=0.0),
            tl.load(base + (i + D // 2)[None, :], mask=mask, other=0.0),
        )


@triton.jit
def _store_pairs(base, x1, x2, row_mask, D, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    i = tl.arange(0, HALF)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF)
        x = tl.reshape(tl.join(x1, x2), (HEADS, 2 * HALF))
        tl.store(base + cols[None, :], x.to(base.dtype.element_ty), mask=row_mask[:, None] & (cols < D)[None, :])
    else:
        mask = row_mask[:, None] & (i < D // 2)[None, :]
        tl.store(base + i[None, :], x1.to(base.dtype.element_ty), mask=mask)
        tl.store(base + (i + D // 2)[None, :], x2.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(x1, x2, cos, sin, kind: tl.constexpr, ROUND: tl.constexpr):
    """Computes (x1 * cos + x2 * sin, x2 * cos - x1 * sin). ROUND: rounds the result of each multiplication to 16 bits,
    as torch does without an fp32 cast. Launched with enable_fp_fusion=False then: a fused multiply-add would round
    once."""
    a1, a2, b1, b2 = x1 * cos, x2 * cos, x2 * sin, x1 * sin
    if ROUND:
        a1, a2 = a1.to(kind).to(tl.float32), a2.to(kind).to(tl.float32)
        b1, b2 = b1.to(kind).to(tl.float32), b2.to(kind).to(tl.float32)
    return a1 + b1, a2 - b2


@triton.jit
def _qk_rope_fwd(
    x_ptr, out_ptr, w_ptr, cos_ptr, sin_ptr,
    stride_token, stride_head, stride_out, T, H, D, stride_table, stride_w, eps,
    token, block,
    ROPE: tl.constexpr, ROUND: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, FP32_WEIGHT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    heads = block * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    half_mask = i < D // 2
    known = heads < H
    mask = known[:, None] & half_mask[None, :]
    base = x_ptr + token * stride_token + heads[:, None].to(tl.int64) * stride_head
    raw1, raw2 = _load_pairs(base, known, D, INTERLEAVED, HEADS, HALF)
    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
    if NORM:
        if LAYER:
            mean = (tl.sum(x1, axis=1) + tl.sum(x2, axis=1)) / D
            x1 = tl.where(mask, x1 - mean[:, None], 0.0)
            x2 = tl.where(mask, x2 - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)
        w_base = w_ptr + heads[:, None] * stride_w
        w1, w2 = _load_pairs(w_base, known, D, INTERLEAVED, HEADS, HALF)
        w1, w2 = w1.to(tl.float32), w2.to(tl.float32)
        if UNIT_OFFSET:
            w1, w2 = 1.0 + w1, 1.0 + w2
        x1, x2 = x1 * rstd[:, None], x2 * rstd[:, None]
        if not FP32_WEIGHT:
            x1, x2 = x1.to(raw1.dtype).to(tl.float32), x2.to(raw1.dtype).to(tl.float32)
        x1, x2 = (x1 * w1).to(raw1.dtype).to(tl.float32), (x2 * w2).to(raw1.dtype).to(tl.float32)
    if ROPE:
        cos, sin = _load_tables(cos_ptr, sin_ptr, token, T, stride_table, i, half_mask, D, INTERLEAVED)
        x1, x2 = _rotate(x1, x2, cos[None, :], -sin[None, :], raw1.dtype, ROUND)
    out = out_ptr + token * stride_out + heads[:, None] * D
    _store_pairs(out, x1, x2, known, D, INTERLEAVED, HEADS, HALF)


@triton.jit
def _qk_rope_bwd(
    d_ptr, x_ptr, out_ptr, w_ptr, dw_ptr, cos_ptr, sin_ptr,
    stride_d_token, stride_d_head, stride_token, stride_head, stride_out, T, H, D, stride_table, stride_w, eps,
    token, block,
    ROPE: tl.constexpr, ROUND: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, TRAIN_W: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    heads = block * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    half_mask = i < D // 2
    known = heads < H
    mask = known[:, None] & half_mask[None, :]
    d_base = d_ptr + token * stride_d_token + heads[:, None].to(tl.int64) * stride_d_head
    g1, g2 = _load_pairs(d_base, known, D, INTERLEAVED, HEADS, HALF)
    g1, g2 = g1.to(tl.float32), g2.to(tl.float32)
    if ROPE:
        cos, sin = _load_tables(cos_ptr, sin_ptr, token, T, stride_table, i, half_mask, D, INTERLEAVED)
        g1, g2 = _rotate(g1, g2, cos[None, :], sin[None, :], d_ptr.dtype.element_ty, ROUND)
    if NORM:
        base = x_ptr + token * stride_token + heads[:, None].to(tl.int64) * stride_head
        x1, x2 = _load_pairs(base, known, D, INTERLEAVED, HEADS, HALF)
        x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
        if LAYER:
            mean = (tl.sum(x1, axis=1) + tl.sum(x2, axis=1)) / D
            x1 = tl.where(mask, x1 - mean[:, None], 0.0)
            x2 = tl.where(mask, x2 - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)[:, None]
        x1, x2 = x1 * rstd, x2 * rstd
        w_base = w_ptr + heads[:, None] * stride_w
        w1, w2 = _load_pairs(w_base, known, D, INTERLEAVED, HEADS, HALF)
        w1, w2 = w1.to(tl.float32), w2.to(tl.float32)
        if UNIT_OFFSET:
            w1, w2 = 1.0 + w1, 1.0 + w2
        if TRAIN_W:
            dw = dw_ptr + token * H * D + heads[:, None] * D
            _store_pairs(dw, g1 * x1, g2 * x2, known, D, INTERLEAVED, HEADS, HALF)
        g1, g2 = g1 * w1, g2 * w2
        centre = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / D)[:, None]
        shift = ((tl.sum(g1, axis=1) + tl.sum(g2, axis=1)) / D)[:, None]
        g1, g2 = g1 - x1 * centre, g2 - x2 * centre
        if LAYER:
            g1, g2 = g1 - shift, g2 - shift
        g1, g2 = g1 * rstd, g2 * rstd
    out = out_ptr + token * stride_out + heads[:, None] * D
    _store_pairs(out, g1, g2, known, D, INTERLEAVED, HEADS, HALF)


@triton.jit(do_not_specialize=["T"])
def _both_fwd(
    q_ptr, k_ptr, q_out, k_out, wq_ptr, wk_ptr, cos_ptr, sin_ptr,
    sq_token, sq_head, sk_token, sk_head, sq_out, sk_out, T, HQ, HK, D, stride_table, stride_w, eps, q_blocks,
    ROPE: tl.constexpr, ROUND: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, FP32_WEIGHT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if block < q_blocks:
        _qk_rope_fwd(
            q_ptr, q_out, wq_ptr, cos_ptr, sin_ptr, sq_token, sq_head, sq_out, T, HQ, D, stride_table, stride_w, eps,
            token, block, ROPE, ROUND, INTERLEAVED, NORM, LAYER, UNIT_OFFSET, FP32_WEIGHT, HEADS, HALF,
        )  # fmt: skip
    else:
        _qk_rope_fwd(
            k_ptr, k_out, wk_ptr, cos_ptr, sin_ptr, sk_token, sk_head, sk_out, T, HK, D, stride_table, stride_w, eps,
            token, block - q_blocks, ROPE, ROUND, INTERLEAVED, NORM, LAYER, UNIT_OFFSET, FP32_WEIGHT, HEADS, HALF,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _both_bwd(
    dq_ptr, dk_ptr, q_ptr, k_ptr, dq_out, dk_out, wq_ptr, wk_ptr, dwq_ptr, dwk_ptr, cos_ptr, sin_ptr,
    sdq_token, sdq_head, sdk_token, sdk_head, sq_token, sq_head, sk_token, sk_head, sq_out, sk_out,
    T, HQ, HK, D, stride_table, stride_w, eps, q_blocks,
    ROPE: tl.constexpr, ROUND: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, TRAIN_W: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if block < q_blocks:
        _qk_rope_bwd(
            dq_ptr, q_ptr, dq_out, wq_ptr, dwq_ptr, cos_ptr, sin_ptr, sdq_token, sdq_head, sq_token, sq_head,
            sq_out, T, HQ, D, stride_table, stride_w, eps, token, block,
            ROPE, ROUND, INTERLEAVED, NORM, LAYER, UNIT_OFFSET, TRAIN_W, HEADS, HALF,
        )  # fmt: skip
    else:
        _qk_rope_bwd(
            dk_ptr, k_ptr, dk_out, wk_ptr, dwk_ptr, cos_ptr, sin_ptr, sdk_token, sdk_head, sk_token, sk_head,
            sk_out, T, HK, D, stride_table, stride_w, eps, token, block - q_blocks,
            ROPE, ROUND, INTERLEAVED, NORM, LAYER, UNIT_OFFSET, TRAIN_W, HEADS, HALF,
        )  # fmt: skip


def _plan(q: torch.Tensor, k: torch.Tensor) -> tuple[tuple[int, int], dict[str, int], int]:
    tokens, (hq, hk, d) = q.shape[0] * q.shape[1], (q.shape[2], k.shape[2], q.shape[3])
    half = triton.next_power_of_2(d // 2)
    heads = min(triton.next_power_of_2(max(hq, hk)), max(1, 2048 // half))
    q_blocks = triton.cdiv(hq, heads)
    return (tokens, q_blocks + triton.cdiv(hk, heads)), {"HEADS": heads, "HALF": half, "num_warps": 4}, q_blocks


def flat_tokens(x: torch.Tensor) -> torch.Tensor:
    """Returns x (B, T, H, D) with contiguous channels and with B and T strides that fold into one token stride; copies
    if necessary."""
    foldable = x.stride(3) == 1 and (1 in x.shape[:2] or x.stride(0) == x.stride(1) * x.shape[1])
    return x if foldable else x.contiguous()


def token_stride(x_BTHD: torch.Tensor) -> int:
    """Elements from one token to the next, also across sequences. (The stride of an axis of length one is
    arbitrary.)"""
    return x_BTHD.stride(0) if x_BTHD.shape[1] == 1 else x_BTHD.stride(1)


def _table_stride(table: torch.Tensor) -> int:
    return 0 if table.shape[0] == 1 else table.stride(0)


@dataclass(frozen=True)
class RopeConfig:
    """interleaved: the layout of channel pairs. fp32: rotate in fp32. norm: the q/k norm, read only where it has
    weights."""

    interleaved: bool
    fp32: bool
    norm: NormConfig


Pair = tuple[torch.Tensor, torch.Tensor]


def qk_rope_fwd(qk: Pair, weights: Pair | None, table: Pair | None, config: RopeConfig, out: Pair) -> None:
    """Writes the normed and rotated q and k into `out` (B, T, H, D), which may be q and k themselves.

    out: contiguous heads and channels, any token stride. weights: of the q/k norm. table: cos and sin, contiguous.
    """
    q, k = qk
    grid, meta, q_blocks = _plan(q, k)
    cos, sin = table if table is not None else qk
    wq, wk = weights if weights is not None else qk
    if grid[0]:
        with on_device(q):
            _both_fwd[grid](
                q, k, *out, wq, wk, cos, sin, token_stride(q), q.stride(2), token_stride(k), k.stride(2), token_stride(out[0]),
                token_stride(out[1]), q.shape[1], q.shape[2], k.shape[2], q.shape[3], _table_stride(cos) if table else 0,
                q.shape[3] if weights is not None and wq.dim() == 2 else 0, config.norm.eps, q_blocks,
                ROPE=table is not None, ROUND=not config.fp32, INTERLEAVED=config.interleaved, NORM=weights is not None, LAYER=config.norm.kind == "layer",
                UNIT_OFFSET=config.norm.unit_offset, FP32_WEIGHT=config.norm.fp32_weight, enable_fp_fusion=config.fp32, **meta,
            )  # fmt: skip


def qk_rope_bwd(  # noqa: PLR0917
    d: Pair, qk: Pair | None, weights: Pair | None, table: Pair | None, config: RopeConfig, out: Pair, train: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Writes the gradients of q and k into `out`; returns those of the norm's weights if `train`, else (None, None).

    qk: the inputs of the forward, needed with a norm only. Each program stores its own fp32 weight gradient; torch
    sums them.
    """
    dq, dk = d
    grid, meta, q_blocks = _plan(dq, dk)
    partial = [torch.empty(g.shape, device=g.device, dtype=torch.float32) if train else g for g in d]
    q, k = qk if qk is not None else d
    wq, wk = weights if weights is not None else d
    cos, sin = table if table is not None else d
    if grid[0]:
        with on_device(dq):
            _both_bwd[grid](
                dq, dk, q, k, *out, wq, wk, *partial, cos, sin,
                token_stride(dq), dq.stride(2), token_stride(dk), dk.stride(2), token_stride(q), q.stride(2), token_stride(k), k.stride(2),
                token_stride(out[0]), token_stride(out[1]), dq.shape[1], dq.shape[2], dk.shape[2], dq.shape[3],
                _table_stride(cos) if table else 0, dq.shape[3] if weights is not None and wq.dim() == 2 else 0, config.norm.eps,
                q_blocks, ROPE=table is not None, ROUND=not config.fp32, INTERLEAVED=config.interleaved, NORM=weights is not None,
                LAYER=config.norm.kind == "layer", UNIT_OFFSET=config.norm.unit_offset, TRAIN_W=train, enable_fp_fusion=config.fp32, **meta,
            )  # fmt: skip
    if not train:
        return None, None
    return _sum_to(partial[0], wq), _sum_to(partial[1], wk)


def _sum_to(partial: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = partial.sum((0, 1)) if weight.dim() == 2 else partial.sum((0, 1, 2))
    return total.to(weight.dtype)
