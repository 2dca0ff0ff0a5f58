"""NF4 dequantisation in plain torch: the oracle of the kernel and the path on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hasten.ops.nf4 import NF4Weight


def dequantize_nf4(weight: NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    packed = weight.packed.reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1)[: weight.shape[0] * weight.shape[1]]
    values = weight.code[codes.long()]
    each = _scales(weight).repeat_interleave(weight.block)[: values.shape[0]]
    return (values * each).to(dtype).view(weight.shape)


def _scales(weight: NF4Weight) -> torch.Tensor:
    if weight.scale_code is None or weight.scale_of_scales is None or weight.offset is None:
        return weight.scales
    outer = weight.scale_of_scales.repeat_interleave(weight.scale_block)[: weight.scales.shape[0]]
    return weight.scale_code[weight.scales.long()] * outer + weight.offset
