"""Dequantises NF4 to bf16 in one pass, double quantisation included: reads half a byte per element, writes two.

A thread reads one 32-bit word of eight codes and writes eight neighbouring values: 16 bytes in 16 bits, coalesced with
its neighbours. Scales are looked up once per word. There is no division.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from hasten.ops.backend import on_device

if TYPE_CHECKING:
    from hasten.ops.nf4 import NF4Weight

CODES_A_WORD = 8
"""4-bit codes in a 32-bit word."""


@dataclass(frozen=True)
class Launch:
    """words: 32-bit words of eight codes per program. warps: per program."""

    words: int
    warps: int


LAUNCHES = (Launch(512, 4), Launch(1024, 8))
"""Launches to choose from: the first one is used; `python -m benchmarks.tune nf4` times all."""


@triton.jit
def _dequantize(
    words_ptr, code_ptr, scales_ptr, scale_code_ptr, outer_ptr, offset_ptr, out_ptr, stride_out, row_words, parts,
    DOUBLE: tl.constexpr, BLOCK_WORDS: tl.constexpr, SCALE_BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // parts
    first = tl.program_id(0) % parts * WORDS  # within its row, which begins with a new word and a new block
    lane = tl.arange(0, WORDS)
    inside = lane < row_words - first
    before = row.to(tl.int64) * row_words + first
    packed = tl.load(words_ptr + before + lane, mask=inside, other=0)
    block = (before // BLOCK_WORDS).to(tl.int32) + lane // BLOCK_WORDS
    scale = tl.load(scales_ptr + block, mask=inside, other=0)
    if DOUBLE:
        inner = tl.load(scale_code_ptr + scale.to(tl.int32), mask=inside, other=0.0)
        outer = tl.load(outer_ptr + block // SCALE_BLOCK, mask=inside, other=0.0)
        scale = inner * outer + tl.load(offset_ptr)
    place = tl.arange(0, 8)  # bytes of a word in order; of each byte the high half first
    nibble = (packed[:, None] >> (place // 2 * 8 + 4 - place % 2 * 4)[None, :]) & 15
    value = (tl.load(code_ptr + nibble) * scale[:, None]).to(out_ptr.dtype.element_ty)
    target = out_ptr + row.to(tl.int64) * stride_out + first.to(tl.int64) * 8
    tl.store(target + (lane[:, None] * 8 + place[None, :]), value, mask=inside[:, None])


def _words(packed: torch.Tensor) -> torch.Tensor:
    """Returns the packed bytes as int32. Copies if their number or their address is not a multiple of four."""
    flat = packed.reshape(-1)
    if flat.numel() % 4 or flat.data_ptr() % 4:
        flat = F.pad(flat, (0, -flat.numel() % 4))
    return flat.view(torch.int32)


def dequantize_nf4(
    weight: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None, launch: Launch = LAUNCHES[0]
) -> torch.Tensor:
    rows, width = weight.shape
    if out is None:
        out = torch.empty(rows, width, device=weight.packed.device, dtype=dtype)
    words, left = divmod(rows * width, CODES_A_WORD)
    if left == 0 and out.is_contiguous():
        _write(weight, out.view(1, rows * width), launch)
    elif width % weight.block == 0:
        _write(weight, out, launch)
    else:  # rows do not begin with a new block, or the last word is not full
        whole = torch.empty(1, (words + 1) * CODES_A_WORD, device=out.device, dtype=out.dtype)
        _write(weight, whole, launch)
        out.copy_(whole[0, : rows * width].view(rows, width))
    return out


def _write(weight: NF4Weight, out: torch.Tensor, launch: Launch) -> None:
    """Launches the kernel. out: any shape with the elements in order, whose rows begin with a new word and a new
    block."""
    row_words = out.shape[1] // CODES_A_WORD
    parts = triton.cdiv(row_words, launch.words)
    with on_device(out):
        _dequantize[(out.shape[0] * parts,)](
            _words(weight.packed), weight.code, weight.scales,
            weight.scale_code if weight.scale_code is not None else weight.code,
            weight.scale_of_scales if weight.scale_of_scales is not None else weight.code,
            weight.offset if weight.offset is not None else weight.code,
            out, out.stride(0), row_words, parts,
            DOUBLE=weight.scale_code is not None, BLOCK_WORDS=weight.block // CODES_A_WORD,
            SCALE_BLOCK=weight.scale_block, WORDS=launch.words, num_warps=launch.warps,
        )  # fmt: skip
