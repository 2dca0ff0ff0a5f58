"""One new token per sequence in one launch: q/k norm, RoPE, the cache write and split-KV attention.

One program takes the query heads of one group over a part of the visible tiles of keys. It norms and rotates its queries itself; the
program whose part holds the new token also norms, rotates and writes the new key and value. The program of a group that finishes last
adds up the parts (a counter per group tells which), in the order of the keys, so results do not depend on timing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hasten.ops.attention.kernels.tiles import ScoreMaskConfig, dot, score, visible
from hasten.ops.backend import on_device
from hasten.ops.decode_attention.kernels.attend import KEYS, splits_for
from hasten.ops.decode_attention.kernels.write import block_start, scale_arguments, scales_start, store_token
from hasten.ops.rope.function import rope_config

if TYPE_CHECKING:
    from hasten.ops.decode_attention import CacheView, NewToken

WARPS = 4


@triton.jit
def _normed(x, w, rstd, kind: tl.constexpr, UNIT_OFFSET: tl.constexpr, FP32_WEIGHT: tl.constexpr):
    """Scales x by rstd and the norm's weight, rounded as `ops.rope` rounds."""
    x = x * rstd
    if UNIT_OFFSET:
        w = 1.0 + w
    if not FP32_WEIGHT:
        x = x.to(kind).to(tl.float32)
    return (x * w).to(kind).to(tl.float32)


@triton.jit
def _rotated(
    base, w_base, cos_ptr, sin_ptr, real, channel, D, eps,
    ROPE: tl.constexpr, ROUND: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, FP32_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Norms and rotates the rows at `base` (ROWS, 1). Each channel is computed with the other one of its pair, which is loaded too."""
    kind: tl.constexpr = base.dtype.element_ty
    half = D // 2
    if INTERLEAVED:
        other = channel + 1 - 2 * (channel % 2)
        first = channel % 2 == 0
    else:
        other = tl.where(channel < half, channel + half, channel - half)
        first = channel < half
    mask = real & (channel < D)[None, :]
    x = tl.load(base + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(base + other[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        if LAYER:
            mean = (tl.sum(x, 1) / D)[:, None]
            x, y = tl.where(mask, x - mean, 0.0), tl.where(mask, y - mean, 0.0)
        rstd = 1.0 / tl.sqrt((tl.sum(x * x, 1) / D + eps)[:, None])
        w = tl.load(w_base + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        w_other = tl.load(w_base + other[None, :], mask=mask, other=0.0).to(tl.float32)
        x = _normed(x, w, rstd, kind, UNIT_OFFSET, FP32_WEIGHT)
        y = _normed(y, w_other, rstd, kind, UNIT_OFFSET, FP32_WEIGHT)
    if ROPE:
        cos = tl.load(cos_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
        a, b = x * cos, y * tl.where(first[None, :], -sin, sin)
        if ROUND:
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
        x = a + b
    return x.to(kind)


@triton.jit
def _new_token(
    q_ptr, k_ptr, v_ptr, out_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, table_ptr, like_ptr, scale_table_ptr, slots_ptr, starts_ptr,
    count_ptr, acc_ptr, top_ptr, total_ptr, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_w, stride_rope,
    stride_kv, stride_scale, K, D, eps, window, scale, cap,
    LARGEST: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROPE: tl.constexpr, ROUND: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, UNIT_OFFSET: tl.constexpr, FP32_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, h = (head // K).to(tl.int64), (head % K).to(tl.int64)
    slot, start = tl.load(slots_ptr + b), tl.load(starts_ptr + b)
    first = start
    if WINDOW:
        first = tl.maximum(start, slot - window + 1)
    lowest, end = tl.minimum(first, slot) // KEYS, slot // KEYS + 1
    part = tl.cdiv(end - lowest, splits)
    used = tl.cdiv(end - lowest, part)
    if split >= used:
        return
    row, channel, column = tl.arange(0, ROWS), tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    inside = channel < D
    real = (row < GROUP)[:, None]
    heads = h * GROUP + row[:, None]
    cos, sin = cos_ptr + b * stride_rope, sin_ptr + b * stride_rope
    q = _rotated(
        q_ptr + b * stride_qb + heads * stride_qh, wq_ptr + heads * stride_w, cos, sin, real, channel, D, eps,
        ROPE, ROUND, INTERLEAVED, NORM, LAYER, UNIT_OFFSET, FP32_WEIGHT,
    )  # fmt: skip
    lo = lowest + split * part
    hi = tl.minimum(lo + part, end)
    if hi == end:
        one = tl.arange(0, 1)[:, None]
        k_new = _rotated(
            k_ptr + b * stride_kb + h * stride_kh + one, wk_ptr + h * stride_w + one, cos, sin, one == 0, channel, D, eps,
            ROPE, ROUND, INTERLEAVED, NORM, LAYER, UNIT_OFFSET, FP32_WEIGHT,
        )  # fmt: skip
        v_new = tl.load(v_ptr + b * stride_vb + h * stride_vh + channel, mask=inside, other=0.0)
        new_row = (b * K + h) * BLOCK + slot % BLOCK
        place = block_start(table_ptr, slot, like_ptr, BLOCK) + new_row * D + channel
        new_scale = scales_start(scale_table_ptr, slot, BLOCK) + new_row if LARGEST > 0 else slots_ptr
        store_token(tl.sum(k_new.to(tl.float32), 0), place, new_scale, inside, LARGEST)
        store_token(v_new, place + stride_kv, new_scale + stride_scale, inside, LARGEST)
        tl.debug_barrier()  # the threads of this program read it below
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for tile in range(lo, hi):
        key = tile * KEYS + column
        place = block_start(table_ptr, tile * KEYS, like_ptr, BLOCK) + (b * K + h) * BLOCK * D
        place += (key % BLOCK)[:, None] * D + channel[None, :]
        written = (key <= slot)[:, None] & inside[None, :]
        k = tl.load(place, mask=written, other=0.0).to(q.dtype)
        products = dot(q, tl.trans(k), UPCAST)
        if LARGEST > 0:
            scale_place = scales_start(scale_table_ptr, tile * KEYS, BLOCK) + (b * K + h) * BLOCK + key % BLOCK
            products *= tl.load(scale_place, mask=key <= slot, other=0.0)[None, :]
        scores, _ = score(products, scale, cap, SOFTCAP, EXACT)
        seen = visible(slot + row[:, None] * 0, key[None, :], 0, window, WINDOW, False)
        scores = tl.where(seen & (key >= start)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        if LARGEST > 0:
            p *= tl.load(scale_place + stride_scale, mask=key <= slot, other=0.0)[None, :]
        v = tl.load(place + stride_kv, mask=written, other=0.0).to(q.dtype)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, UPCAST)
        top = new_top
    stored = real & inside[None, :]
    if used > 1:
        base = head.to(tl.int64) * splits * GROUP
        place = base + split * GROUP + row
        tl.store(top_ptr + place, top, mask=row < GROUP)
        tl.store(total_ptr + place, total, mask=row < GROUP)
        tl.store(acc_ptr + place[:, None] * D + channel[None, :], acc, mask=stored)
        tl.debug_barrier()  # every thread's stores come before the count
        if tl.atomic_add(count_ptr + head, 1) != used - 1:
            return
        tl.store(count_ptr + head, 0)  # for the next launch
        acc = tl.zeros((ROWS, CHANNELS), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        for other in range(used):
            place = base + other * GROUP + row
            # .cg: the other programs' stores are in L2
            its_top = tl.load(top_ptr + place, mask=row < GROUP, other=float("-inf"), cache_modifier=".cg")
            its_total = tl.load(total_ptr + place, mask=row < GROUP, other=0.0, cache_modifier=".cg")
            its_acc = tl.load(
                acc_ptr + place[:, None] * D + channel[None, :], mask=stored, other=0.0, cache_modifier=".cg"
            )
            new_top = tl.maximum(top, its_top)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            mine, its = tl.exp2(top - shift), tl.exp2(its_top - shift)
            total = total * mine + its_total * its
            acc = acc * mine[:, None] + its_acc * its[:, None]
            top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out_ptr + ((b * K * GROUP + heads) * D) + channel[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=stored)


def attend_new_token(
    token: NewToken, cache: CacheView, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    q, k, v = token.q_B1HD[:, 0], token.k_B1KD[:, 0], token.v_B1KD[:, 0]
    batch, heads, channels = q.shape
    kv_heads, first, groups = k.shape[1], cache.blocks[0], batch * k.shape[1]
    group = heads // kv_heads
    splits = splits_for(groups, cache.table.shape[0] * first.shape[3])
    count = cache.counts if cache.counts is not None else q.new_zeros(groups, dtype=torch.int32)
    acc = q.new_empty(groups, splits, group, channels, dtype=torch.float32)
    top, total = (q.new_empty(groups, splits, group, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(batch, 1, heads, channels)
    config = ScoreMaskConfig(scale, window, softcap)
    rope = rope_config(token.rotation, token.fp32, token.qk_norm)
    cos, sin = (q, q) if token.position is None else (table.contiguous() for table in token.position)
    wq, wk = (
        (q, q) if token.qk_norm is None else (token.qk_norm.q_weight.contiguous(), token.qk_norm.k_weight.contiguous())
    )
    scale_table, stride_scale, largest = scale_arguments(cache)
    with on_device(q):
        _new_token[(groups, splits)](
            q, k, v, out, wq, wk, cos, sin, cache.table, first, scale_table, cache.slots_B, cache.starts_B, count, acc, top, total,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], channels if token.qk_norm is not None and wq.dim() == 2 else 0,
            0 if cos.shape[0] == 1 or token.position is None else cos.stride(0), first.stride(0), stride_scale, kv_heads, channels, rope.norm.eps,
            *config.arguments(),
            LARGEST=largest, GROUP=group, WINDOW=window is not None, SOFTCAP=softcap is not None, ROPE=token.position is not None,
            ROUND=not token.fp32, INTERLEAVED=rope.interleaved, NORM=token.qk_norm is not None, LAYER=rope.norm.kind == "layer",
            UNIT_OFFSET=rope.norm.unit_offset, FP32_WEIGHT=rope.norm.fp32_weight,
            ROWS=max(16, triton.next_power_of_2(group)), CHANNELS=max(16, triton.next_power_of_2(channels)), BLOCK=first.shape[3],
            KEYS=KEYS, UPCAST=not q.is_cuda, EXACT=q.dtype == torch.float32, enable_fp_fusion=token.fp32, num_warps=WARPS,
        )  # fmt: skip
    return out
