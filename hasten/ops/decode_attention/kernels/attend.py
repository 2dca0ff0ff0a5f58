"""Split-KV decode attention (Flash-Decoding, Dao et al. 2023): programs share the keys of a head, a second kernel adds up.

One program computes all new tokens of the query heads of one group, whose rows fill a tile of a tensor core, over a part of the
visible tiles of keys. The grid does not depend on how many tokens are cached; parts without a tile write a weight of 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hasten.ops.attention.kernels.tiles import ScoreMaskConfig, dot, score, visible
from hasten.ops.backend import on_device
from hasten.ops.decode_attention.kernels.write import block_start, scale_arguments, scales_start

if TYPE_CHECKING:
    from hasten.ops.decode_attention import CacheView

KEYS = 64
"""Keys per tile; a block of the cache holds a whole number of tiles."""
PROGRAMS = 264
"""Programs to start at least, two for each multiprocessor of an H100."""
MAX_SPLITS = 32


@triton.jit
def _attend(
    q_ptr, table_ptr, like_ptr, scale_table_ptr, slots_ptr, starts_ptr, acc_ptr, top_ptr, total_ptr, stride_qb, stride_qt, stride_qh, stride_kv,
    stride_scale, T, K, D, window, scale, cap, QUANTISED: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, h = (head // K).to(tl.int64), (head % K).to(tl.int64)
    row, channel, column = tl.arange(0, ROWS), tl.arange(0, CHANNELS), tl.arange(0, KEYS)
    t = row // GROUP
    real, inside = row < T * GROUP, channel < D
    slot, start = tl.load(slots_ptr + b), tl.load(starts_ptr + b)
    query = slot + t
    q_place = b * stride_qb + t * stride_qt + (h * GROUP + row % GROUP) * stride_qh
    q = tl.load(q_ptr + q_place[:, None] + channel[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    first = start
    if WINDOW:
        first = tl.maximum(start, slot - window + 1)
    tiles = tl.cdiv(slot + T, KEYS) - first // KEYS
    part = tl.cdiv(tiles, splits)
    lo = first // KEYS + split * part
    hi = tl.minimum(lo + part, tl.cdiv(slot + T, KEYS))
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for tile in range(lo, hi):
        key = tile * KEYS + column
        place = block_start(table_ptr, tile * KEYS, like_ptr, BLOCK) + (b * K + h) * BLOCK * D
        place += (key % BLOCK)[:, None] * D + channel[None, :]
        written = (key < slot + T)[:, None] & inside[None, :]
        k = tl.load(place, mask=written, other=0.0).to(q.dtype)
        products = dot(q, tl.trans(k), UPCAST)
        if QUANTISED:
            scale_place = scales_start(scale_table_ptr, tile * KEYS, BLOCK) + (b * K + h) * BLOCK + key % BLOCK
            products *= tl.load(scale_place, mask=key < slot + T, other=0.0)[None, :]
        scores, _ = score(products, scale, cap, SOFTCAP, EXACT)
        seen = visible(query[:, None], key[None, :], 0, window, WINDOW, False)
        scores = tl.where(seen & (key >= start)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        if QUANTISED:
            p *= tl.load(scale_place + stride_scale, mask=key < slot + T, other=0.0)[None, :]
        v = tl.load(place + stride_kv, mask=written, other=0.0).to(q.dtype)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, UPCAST)
        top = new_top
    out = (head.to(tl.int64) * splits + split) * T * GROUP + row
    tl.store(top_ptr + out, top, mask=real)
    tl.store(total_ptr + out, total, mask=real)
    tl.store(acc_ptr + out[:, None] * D + channel[None, :], acc, mask=real[:, None] & inside[None, :])


@triton.jit
def _combine(
    acc_ptr, top_ptr, total_ptr, out_ptr, rows, K, D, splits, GROUP: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, CHANNELS)
    place = (head * splits + split) * rows + row
    top = tl.load(top_ptr + place, mask=split < splits, other=float("-inf"))
    total = tl.load(total_ptr + place, mask=split < splits, other=0.0)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    inside = (split < splits)[:, None] & (channel < D)[None, :]
    acc = tl.load(acc_ptr + place[:, None] * D + channel[None, :], mask=inside, other=0.0)
    whole = tl.sum(total * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    b, h, t, g = head // K, head % K, row // GROUP, row % GROUP
    tokens = rows // GROUP
    target = ((b * tokens + t) * K * GROUP + h * GROUP + g) * D + channel
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=channel < D)


def splits_for(heads: int, capacity: int) -> int:
    """Parts of the keys of each of `heads` groups, for a cache that may grow to `capacity` tokens."""
    return max(1, min(MAX_SPLITS, -(-PROGRAMS // heads), -(-capacity // KEYS)))


def decode_attention(
    q_BTHD: torch.Tensor, cache: CacheView, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    batch, tokens, heads, channels = q_BTHD.shape
    first = cache.blocks[0]
    kv_heads, block = first.shape[2], first.shape[3]
    group = heads // kv_heads
    rows = tokens * group
    splits = splits_for(batch * kv_heads, cache.table.shape[0] * block)
    config = ScoreMaskConfig(scale, window, softcap)
    make = q_BTHD.new_empty
    acc = make(batch * kv_heads, splits, rows, channels, dtype=torch.float32)
    top, total = (make(batch * kv_heads, splits, rows, dtype=torch.float32) for _ in range(2))
    out = make(q_BTHD.shape)
    width = max(16, triton.next_power_of_2(channels))
    scale_table, stride_scale, largest = scale_arguments(cache)
    with on_device(q_BTHD):
        _attend[(batch * kv_heads, splits)](
            q_BTHD, cache.table, first, scale_table, cache.slots_B, cache.starts_B, acc, top, total, *q_BTHD.stride()[:3],
            first.stride(0), stride_scale, tokens, kv_heads, channels, *config.arguments(), QUANTISED=largest > 0,
            GROUP=group, WINDOW=window is not None, SOFTCAP=softcap is not None,
            ROWS=max(16, triton.next_power_of_2(rows)), CHANNELS=width, BLOCK=block, KEYS=KEYS,
            UPCAST=not q_BTHD.is_cuda, EXACT=q_BTHD.dtype == torch.float32, num_warps=4,
        )  # fmt: skip
        _combine[(batch * kv_heads, rows)](
            acc, top, total, out, rows, kv_heads, channels, splits,
            GROUP=group, SPLITS=triton.next_power_of_2(splits), CHANNELS=width, num_warps=1,
        )  # fmt: skip
    return out
