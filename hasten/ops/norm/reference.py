"""The norm in plain torch: the oracle of the kernels and the path on the CPU."""

import torch

from hasten.ops.norm.config import NormConfig
from hasten.ops.precision import at_least_fp32


def norm(x: torch.Tensor, weight: torch.Tensor, config: NormConfig) -> torch.Tensor:
    wide = at_least_fp32(x)
    if config.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.eps)
    scale = at_least_fp32(weight) if config.fp32_weight else weight
    if config.unit_offset:
        scale = 1.0 + scale
    return (normed * scale).to(x.dtype) if config.fp32_weight else scale * normed.to(x.dtype)
