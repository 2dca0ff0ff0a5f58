"""Linears of one token for NF4 matrices: reads half a byte per weight, once, and never writes a dense weight.

One warp per program: a thread reads 16 bytes, 32 codes of one output channel, and keeps the 32 inputs they meet in registers for
`CHANNELS` output channels. The code book lies in the warp's registers too, an entry per lane, and is looked up by warp shuffles,
which measured faster than a table in the L1 cache or byte permutations. Sums are in fp32; one scale is looked up per 32 codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device
from hasten.ops.matvec.kernels.epilogue import epilogue, finished, gated

if TYPE_CHECKING:
    from hasten.ops.matvec import Part
    from hasten.ops.nf4 import NF4Weight

CHANNELS = 2
"""Output channels per program."""
CHANNELS_MANY = 4
"""The same for matrices with more than `MANY` output channels and no more input channels than `LONG`."""
MANY, LONG = 8192, 8192
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
def _four_inputs(x_ptr, word, inside, LANES: tl.constexpr):
    """The inputs of four words from `word` on."""
    return (
        _inputs(x_ptr, word, inside, LANES),
        _inputs(x_ptr, word + 1, inside, LANES),
        _inputs(x_ptr, word + 2, inside, LANES),
        _inputs(x_ptr, word + 3, inside, LANES),
    )


@triton.jit
def _value(book, codes, SHIFT: tl.constexpr, SHUFFLE: tl.constexpr):
    """The values of the codes at bit SHIFT of each word. book: (LANES,), the code book repeated.

    A shuffle reads the register of the lane that the lowest five bits name, so bits above the code need no mask. `tl.gather`
    compiles to the same shuffle, but with several instructions for the index of each code.
    """
    if SHUFFLE:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r",
            [book, codes >> SHIFT],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.gather(book, (codes >> SHIFT) & 15, 0)


@triton.jit
def _word(codes, x, book, SHUFFLE: tl.constexpr):
    """Sum of code * input over the eight codes of each word. Of each byte the high half comes first."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    first = _value(book, codes, 4, SHUFFLE) * x0 + _value(book, codes, 0, SHUFFLE) * x1
    second = _value(book, codes, 12, SHUFFLE) * x2 + _value(book, codes, 8, SHUFFLE) * x3
    third = _value(book, codes, 20, SHUFFLE) * x4 + _value(book, codes, 16, SHUFFLE) * x5
    fourth = _value(book, codes, 28, SHUFFLE) * x6 + _value(book, codes, 24, SHUFFLE) * x7
    return (first + second) + (third + fourth)


@triton.jit
def _row(
    matrix, row, word, inside, x, book,
    DOUBLE: tl.constexpr, BLOCK_WORDS: tl.constexpr, SCALE_BLOCK: tl.constexpr, SHUFFLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The part of W[row] @ x of each thread's four words. x: of `_four_inputs`. matrix: (words, book, scales, scale code, outer, offset, rows, row_words)."""
    words_ptr, _, scales_ptr, scale_code_ptr, outer_ptr, offset_ptr, rows, row_words = matrix
    row = tl.minimum(row, rows - 1)  # a channel past the end repeats the last one
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
    part = _word(codes0, x[0], book, SHUFFLE) + _word(codes1, x[1], book, SHUFFLE)
    part += _word(codes2, x[2], book, SHUFFLE) + _word(codes3, x[3], book, SHUFFLE)
    return part * scale


@triton.jit
def _sums(
    matrix, addend, x_ptr, xa_ptr, base, ranks,
    DOUBLE: tl.constexpr, BLOCK_WORDS: tl.constexpr, SCALE_BLOCK: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    RANKS: tl.constexpr, CHANNELS: tl.constexpr, SHUFFLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """W[base : base + CHANNELS] @ x, plus LoRA and bias. CHANNELS: 2 or 4."""
    lane, rows, row_words = tl.arange(0, LANES), matrix[6], matrix[7]
    book = tl.load(matrix[1] + lane % 16)
    a, b = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    c, d = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for start in range(0, row_words, LANES * 4):
        word = start + lane * 4  # the first of a thread's four
        inside = word < row_words  # whole blocks of scales fill a row, so the other three are inside too
        x = _four_inputs(x_ptr, word, inside, LANES)
        a += _row(matrix, base, word, inside, x, book, DOUBLE, BLOCK_WORDS, SCALE_BLOCK, SHUFFLE, LANES)
        b += _row(matrix, base + 1, word, inside, x, book, DOUBLE, BLOCK_WORDS, SCALE_BLOCK, SHUFFLE, LANES)
        if CHANNELS == 4:
            c += _row(matrix, base + 2, word, inside, x, book, DOUBLE, BLOCK_WORDS, SCALE_BLOCK, SHUFFLE, LANES)
            d += _row(matrix, base + 3, word, inside, x, book, DOUBLE, BLOCK_WORDS, SCALE_BLOCK, SHUFFLE, LANES)
    channel = tl.arange(0, CHANNELS)
    row = base + channel
    sums = tl.where(channel % 2 == 0, tl.sum(a), tl.sum(b))
    if CHANNELS == 4:
        sums = tl.where(channel < 2, sums, tl.where(channel == 2, tl.sum(c), tl.sum(d)))
    return finished(sums, row, row < rows, addend, xa_ptr, ranks, BIAS, SPLITS, RANKS)


@triton.jit
def _linears(
    matrices, addends, x_ptr, xa_ptr, residual_ptr, y_ptr, ranks,
    DOUBLE: tl.constexpr, BLOCK_WORDS: tl.constexpr, SCALE_BLOCK: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    RANKS: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, SHUFFLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first, offset = 0, 0
    for m in tl.static_range(len(matrices)):
        rows = matrices[m][6]
        count = tl.cdiv(rows, CHANNELS)
        if (program >= first) & (program < first + count):
            base = (program - first) * CHANNELS
            sums = _sums(
                matrices[m], addends[m], x_ptr, xa_ptr, base, ranks,
                DOUBLE, BLOCK_WORDS, SCALE_BLOCK, BIAS, SPLITS, RANKS, CHANNELS, SHUFFLE, LANES,
            )  # fmt: skip
            row = base + tl.arange(0, CHANNELS)
            if RESIDUAL:
                sums += tl.load(residual_ptr + offset + row, mask=row < rows, other=0.0).to(tl.float32)
            tl.store(y_ptr + offset + row, sums.to(y_ptr.dtype.element_ty), mask=row < rows)
        first += count
        offset += rows


@triton.jit
def _gated(
    matrices, addends, x_ptr, xa_ptr, y_ptr, ranks,
    DOUBLE: tl.constexpr, BLOCK_WORDS: tl.constexpr, SCALE_BLOCK: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    RANKS: tl.constexpr, CODE: tl.constexpr, CHANNELS: tl.constexpr, SHUFFLE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0) * CHANNELS
    gate = _sums(
        matrices[0], addends[0], x_ptr, xa_ptr, base, ranks,
        DOUBLE, BLOCK_WORDS, SCALE_BLOCK, BIAS, SPLITS, RANKS, CHANNELS, SHUFFLE, LANES,
    )  # fmt: skip
    up = _sums(
        matrices[1], addends[1], x_ptr, xa_ptr, base, ranks,
        DOUBLE, BLOCK_WORDS, SCALE_BLOCK, BIAS, SPLITS, RANKS, CHANNELS, SHUFFLE, LANES,
    )  # fmt: skip
    row = base + tl.arange(0, CHANNELS)
    y = gated(gate, up, x_ptr.dtype.element_ty, CODE)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < matrices[0][6])


def is_served(weight: NF4Weight) -> bool:
    """Returns whether the kernel takes this matrix: rows of whole blocks, whose words and scales are aligned."""
    aligned = weight.packed.data_ptr() % 16 == 0 and weight.packed.numel() % 4 == 0
    return aligned and weight.shape[1] % weight.block == 0 and weight.block % 32 == 0


def layout(weight: NF4Weight) -> tuple[int, int, bool]:
    """What the matrices of one launch must share."""
    return weight.block, weight.scale_block, weight.scale_code is not None


def _matrix(weight: NF4Weight) -> tuple[Any, ...]:
    absent = weight.code
    outer = [absent if t is None else t for t in (weight.scale_code, weight.scale_of_scales, weight.offset)]
    words = weight.packed.reshape(-1).view(torch.int32)
    return words, weight.code, weight.scales, *outer, weight.shape[0], weight.shape[1] // 8


def matvecs_nf4(  # noqa: PLR0917
    parts: Sequence[Part[NF4Weight]],
    x_E: torch.Tensor,
    xa_SR: torch.Tensor | None,
    residual_O: torch.Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `hasten.ops.nf4.matvecs_nf4`. Every matrix must be served and have the same `layout`."""
    ends = epilogue(parts, x_E, xa_SR, residual_O, activation, dtype)
    matrices = tuple(_matrix(part.weight) for part in parts)
    rows = [part.weight.shape[0] for part in parts]
    block, scale_block, double = layout(parts[0].weight)
    channels = CHANNELS_MANY if activation is None and sum(rows) > MANY and x_E.shape[0] <= LONG else CHANNELS
    meta = {
        **ends.meta, "DOUBLE": double, "BLOCK_WORDS": block // 8, "SCALE_BLOCK": scale_block, "CHANNELS": channels,
        "LANES": LANES, "SHUFFLE": x_E.is_cuda and torch.version.hip is None, "num_warps": 1,
    }  # fmt: skip
    with on_device(x_E):
        if activation is not None:
            _gated[(triton.cdiv(rows[0], channels),)](matrices, ends.addends, x_E, ends.xa, ends.y, ends.ranks, **meta)
        else:
            grid = (sum(triton.cdiv(count, channels) for count in rows),)
            _linears[grid](matrices, ends.addends, x_E, ends.xa, ends.residual, ends.y, ends.ranks, **meta)
    return ends.y
