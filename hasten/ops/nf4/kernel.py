"""NF4 to bf16 in one pass, scales of scales included: reads half a byte an element, writes two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from hasten.ops.nf4 import NF4Weight


@triton.jit
def _dequantize(
    packed_ptr, code_ptr, scales_ptr, scale_code_ptr, outer_ptr, offset_ptr, out_ptr, count, width, stride_out,
    DOUBLE: tl.constexpr, BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    mask = byte * 2 < count
    packed = tl.load(packed_ptr + byte, mask=mask, other=0).to(tl.int32)
    scale_at = byte * 2 // BLOCK
    scale = tl.load(scales_ptr + scale_at, mask=mask, other=0)
    if DOUBLE:
        inner = tl.load(scale_code_ptr + scale.to(tl.int32), mask=mask, other=0.0)
        outer = tl.load(outer_ptr + scale_at // SCALE_BLOCK, mask=mask, other=0.0)
        scale = inner * outer + tl.load(offset_ptr)
    high = tl.load(code_ptr + (packed >> 4)) * scale
    low = tl.load(code_ptr + (packed & 15)) * scale
    values = tl.interleave(high, low)
    at = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    target = (at // width) * stride_out + at % width
    tl.store(out_ptr + target, values.to(out_ptr.dtype.element_ty), mask=at < count)


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        out = torch.empty(weight.shape, device=weight.packed.device, dtype=dtype)
    count = weight.shape[0] * weight.shape[1]
    double = weight.scale_code is not None
    unused = weight.code
    step = 1024
    _dequantize[(triton.cdiv(count, 2 * step),)](
        weight.packed, weight.code, weight.scales,
        weight.scale_code if weight.scale_code is not None else unused,
        weight.scale_of_scales if weight.scale_of_scales is not None else unused,
        weight.offset if weight.offset is not None else unused,
        out, count, weight.shape[1], out.stride(0),
        DOUBLE=double, BLOCK=weight.block, SCALE_BLOCK=weight.scale_block, BYTES=step, num_warps=4,
    )  # fmt: skip
    return out
