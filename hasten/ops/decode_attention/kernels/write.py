"""Writes new keys and values into the blocks of the cache, whose addresses are read from a table on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device

if TYPE_CHECKING:
    from hasten.ops.decode_attention import CacheView


@triton.jit
def block_start(table_ptr, slot, like_ptr, BLOCK: tl.constexpr):
    """Pointer to the block of a slot, of the type of `like_ptr`, which points to an element of the cache's dtype."""
    return tl.load(table_ptr + slot // BLOCK).to(like_ptr.dtype)


@triton.jit
def scales_start(table_ptr, slot, BLOCK: tl.constexpr):
    """Pointer to the scales of the block of a slot."""
    return tl.load(table_ptr + slot // BLOCK).to(tl.pointer_type(tl.float32))


@triton.jit
def quantised(x, LARGEST: tl.constexpr, INTEGER: tl.constexpr, kind: tl.constexpr):
    """The codes of x (CHANNELS,) and their scale."""
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1.1754943508222875e-38) / LARGEST
    codes = x / scale
    if INTEGER:
        codes = (codes + 12582912.0) - 12582912.0  # rounds to the nearest, ties to even
    return codes.to(kind), scale


@triton.jit
def store_token(
    x, place, scale_place, inside, LARGEST: tl.constexpr,
):  # fmt: skip
    """Stores a key or value (CHANNELS,) in the cache's dtype. LARGEST: 0 = not quantised."""
    if LARGEST > 0:
        codes, scale = quantised(
            tl.where(inside, x.to(tl.float32), 0.0), LARGEST, place.dtype.element_ty.is_int(), place.dtype.element_ty
        )
        tl.store(place, codes, mask=inside)
        tl.store(scale_place, scale)
    else:
        tl.store(place, x.to(place.dtype.element_ty), mask=inside)


@triton.jit
def _write(
    k_ptr, v_ptr, table_ptr, like_ptr, scale_table_ptr, slots_ptr, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_kv, stride_scale,
    T, K, D, LARGEST: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    h, t, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + b) + t
    channel = tl.arange(0, CHANNELS)
    inside = channel < D
    key = tl.load(k_ptr + b * stride_kb + t * stride_kt + h * stride_kh + channel, mask=inside)
    value = tl.load(v_ptr + b * stride_vb + t * stride_vt + h * stride_vh + channel, mask=inside)
    row = (b * K + h) * BLOCK + slot % BLOCK
    place = block_start(table_ptr, slot, like_ptr, BLOCK) + row * D + channel
    scale_place = scales_start(scale_table_ptr, slot, BLOCK) + row if LARGEST > 0 else slots_ptr
    store_token(key, place, scale_place, inside, LARGEST)
    store_token(value, place + stride_kv, scale_place + stride_scale, inside, LARGEST)


def scale_arguments(cache: CacheView) -> tuple[torch.Tensor, int, float]:
    """Returns the table of scales, the stride from scales of keys to those of values, and the largest code (0 = not quantised)."""
    from hasten.ops.decode_attention import LARGEST

    if not cache.scales or cache.scale_table is None:
        return cache.table, 0, 0.0
    return cache.scale_table, cache.scales[0].stride(0), LARGEST[cache.blocks[0].dtype]


def write_cache(k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, cache: CacheView) -> None:
    batch, tokens, heads, channels = k_BTKD.shape
    first = cache.blocks[0]
    scale_table, stride_scale, largest = scale_arguments(cache)
    with on_device(k_BTKD):
        _write[(heads, tokens, batch)](
            k_BTKD, v_BTKD, cache.table, first, scale_table, cache.slots_B, *k_BTKD.stride()[:3], *v_BTKD.stride()[:3],
            first.stride(0), stride_scale, tokens, heads, channels, LARGEST=largest, BLOCK=first.shape[3],
            CHANNELS=triton.next_power_of_2(channels), num_warps=1,
        )  # fmt: skip
