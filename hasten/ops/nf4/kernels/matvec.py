"""W @ x for an NF4 matrix W and one token x: reads half a byte per weight, once, and never writes a dense weight.

One warp per program: a thread reads 16 bytes, 32 codes of one output channel, and keeps the 32 inputs they meet in registers for
`CHANNELS` output channels. The code book lies in the warp's registers too and is looked up by warp shuffles (`tl.gather`), which
measured faster than a table in the L1 cache or byte permutations. Sums are in fp32; one scale is looked up per 32 codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device

if TYPE_CHECKING:
    from hasten.ops.nf4 import NF4Weight

CHANNELS = 4
"""Output channels per program."""
CHANNELS_LONG = 2
"""The same where the input is longer than `LONG`: more programs, each with more to sum."""
LONG = 8192
LANES = 32
"""Threads of a warp."""


@triton.jit
def _eighths(x, LANES: tl.constexpr):
    """The eight columns of x (LANES, 8), each (LANES,)."""
    even, odd = tl.split(tl.reshape(x, [LANES, 4, 2]))
    even_0, even_1 = tl.split(tl.reshape(even, [LANES, 2, 2]))
    odd_0, odd_1 = tl.split(tl.reshape(odd, [LANES, 2, 2]))
    x0, x4 = tl.split(even_0)
    x2, x6 = tl.split(even_1)
    x1, x5 = tl.split(odd_0)
    x3, x7 = tl.split(odd_1)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _inputs(x_ptr, word, inside, LANES: tl.constexpr):
    """The eight inputs that the codes of each thread's 32-bit word are multiplied with."""
    offsets = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    return _eighths(tl.load(x_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32), LANES)


@triton.jit
def _word(codes, x, book):
    """Sum of code * input over the eight codes of each word. Of each byte the high half comes first."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    first = tl.gather(book, (codes >> 4) & 15, 0) * x0 + tl.gather(book, codes & 15, 0) * x1
    second = tl.gather(book, (codes >> 12) & 15, 0) * x2 + tl.gather(book, (codes >> 8) & 15, 0) * x3
    third = tl.gather(book, (codes >> 20) & 15, 0) * x4 + tl.gather(book, (codes >> 16) & 15, 0) * x5
    fourth = tl.gather(book, (codes >> 28) & 15, 0) * x6 + tl.gather(book, (codes >> 24) & 15, 0) * x7
    return (first + second) + (third + fourth)


@triton.jit
def _matvec(
    words_ptr, book_ptr, scales_ptr, scale_code_ptr, outer_ptr, offset_ptr, x_ptr, y_ptr, rows, row_words,
    DOUBLE: tl.constexpr, BLOCK_WORDS: tl.constexpr, SCALE_BLOCK: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * CHANNELS
    book = tl.load(book_ptr + tl.arange(0, 16))
    channel = tl.arange(0, CHANNELS)
    sums = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, row_words, LANES * 4):
        word = start + tl.arange(0, LANES) * 4  # the first of a thread's four
        inside = word < row_words  # whole blocks of scales fill a row, so the other three are inside too
        x0, x1 = _inputs(x_ptr, word, inside, LANES), _inputs(x_ptr, word + 1, inside, LANES)
        x2, x3 = _inputs(x_ptr, word + 2, inside, LANES), _inputs(x_ptr, word + 3, inside, LANES)
        for i in tl.static_range(CHANNELS):
            row = tl.minimum(first_row + i, rows - 1)  # a channel past the end repeats the last one
            before = row.to(tl.int64) * row_words
            four = before + word[:, None] + tl.arange(0, 4)[None, :]
            codes = tl.load(words_ptr + four, mask=inside[:, None], other=0, eviction_policy="evict_first")
            even, odd = tl.split(tl.reshape(codes, [LANES, 2, 2]))
            codes0, codes2 = tl.split(even)
            codes1, codes3 = tl.split(odd)
            block = (before // BLOCK_WORDS).to(tl.int32) + word // BLOCK_WORDS
            scale = tl.load(scales_ptr + block, mask=inside, other=0)
            if DOUBLE:
                inner = tl.load(scale_code_ptr + scale.to(tl.int32), mask=inside, other=0.0)
                scale = inner * tl.load(outer_ptr + block // SCALE_BLOCK, mask=inside, other=0.0) + tl.load(offset_ptr)
            part = _word(codes0, x0, book) + _word(codes1, x1, book) + _word(codes2, x2, book) + _word(codes3, x3, book)
            sums += tl.where(channel == i, tl.sum(part * scale), 0.0)
    row = first_row + channel
    tl.store(y_ptr + row, sums.to(y_ptr.dtype.element_ty), mask=row < rows)


def is_served(weight: NF4Weight) -> bool:
    """Returns whether the kernel takes this matrix: rows of whole blocks, whose words and scales are aligned."""
    aligned = weight.packed.data_ptr() % 16 == 0 and weight.packed.numel() % 4 == 0
    return aligned and weight.shape[1] % weight.block == 0 and weight.block % 32 == 0


def matvec_nf4(weight: NF4Weight, x_E: torch.Tensor) -> torch.Tensor:
    """x_E: contiguous. Returns (out,) in x's dtype. See `hasten.ops.nf4.matvec_nf4`."""
    rows, width = weight.shape
    y = torch.empty(rows, device=x_E.device, dtype=x_E.dtype)
    channels = CHANNELS if width <= LONG else CHANNELS_LONG
    book = weight.code
    with on_device(x_E):
        _matvec[(triton.cdiv(rows, channels),)](
            weight.packed.reshape(-1).view(torch.int32), book, weight.scales,
            weight.scale_code if weight.scale_code is not None else book,
            weight.scale_of_scales if weight.scale_of_scales is not None else book,
            weight.offset if weight.offset is not None else book,
            x_E, y, rows, width // 8,
            DOUBLE=weight.scale_code is not None, BLOCK_WORDS=weight.block // 8, SCALE_BLOCK=weight.scale_block,
            CHANNELS=channels, LANES=LANES, num_warps=1,
        )  # fmt: skip
    return y
