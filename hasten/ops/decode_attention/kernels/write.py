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
def _write(
    k_ptr, v_ptr, table_ptr, like_ptr, slots_ptr, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_kv, T, K, D,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    h, t, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + b) + t
    channel = tl.arange(0, CHANNELS)
    inside = channel < D
    key = tl.load(k_ptr + b * stride_kb + t * stride_kt + h * stride_kh + channel, mask=inside)
    value = tl.load(v_ptr + b * stride_vb + t * stride_vt + h * stride_vh + channel, mask=inside)
    place = block_start(table_ptr, slot, like_ptr, BLOCK) + ((b * K + h) * BLOCK + slot % BLOCK) * D + channel
    tl.store(place, key.to(like_ptr.dtype.element_ty), mask=inside)
    tl.store(place + stride_kv, value.to(like_ptr.dtype.element_ty), mask=inside)


def write_cache(k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, cache: CacheView) -> None:
    batch, tokens, heads, channels = k_BTKD.shape
    first = cache.blocks[0]
    with on_device(k_BTKD):
        _write[(heads, tokens, batch)](
            k_BTKD, v_BTKD, cache.table, first, cache.slots_B, *k_BTKD.stride()[:3], *v_BTKD.stride()[:3],
            first.stride(0), tokens, heads, channels, BLOCK=first.shape[3], CHANNELS=triton.next_power_of_2(channels), num_warps=1,
        )  # fmt: skip
