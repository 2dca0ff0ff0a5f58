"""The norm in plain torch: the oracle of the kernels and the path on the CPU."""

import torch

from hasten.ops.precision import at_least_fp32


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, kind: str, unit_offset: bool, fp32_weight: bool
) -> torch.Tensor:
    wide = at_least_fp32(x)
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    scale = at_least_fp32(weight) if fp32_weight else weight
    if unit_offset:
        scale = 1.0 + scale
    return (normed * scale).to(x.dtype) if fp32_weight else scale * normed.to(x.dtype)
