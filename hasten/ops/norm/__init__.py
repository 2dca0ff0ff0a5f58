"""RMSNorm and LayerNorm without bias over the last axis.

norm(x, w, NormConfig(eps, kind, unit_offset, fp32_weight)) ==
    n = x32 * rsqrt(mean(x32 ** 2, -1) + eps)                            kind "rms"
    n = (x32 - mean(x32)) * rsqrt(var(x32, unbiased=False) + eps)        kind "layer"
    (w32 + unit_offset) * n, cast to x.dtype                             fp32_weight=True  (Gemma, Cohere)
    (w + unit_offset) * n.to(x.dtype)                                    fp32_weight=False (Llama)
"""

from dataclasses import dataclass

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.norm import reference
from hasten.ops.norm.config import NormConfig


def norm(x: torch.Tensor, weight: torch.Tensor, config: NormConfig, backend: Backend | None = None) -> torch.Tensor:
    """Normalises `x` over its last axis and scales it.

    x: (..., D), any floating dtype. weight: (D,), or (H, D) for one weight per head with x (..., H, D).
    Returns x's shape; x's dtype, or the promotion of both dtypes where config.fp32_weight is False (as transformers does).
    Gradients: x, weight. backend: None = by x's device.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.norm import kernel

        return kernel.norm(x, weight, config)
    return reference.norm(x, weight, config)


def norm_with_residual(
    x: torch.Tensor, weight: torch.Tensor, config: NormConfig, backend: Backend | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x), x): for a stream that is normed for a branch and goes on past it. Its two gradients meet in one pass."""
    if backend_for(x, backend) == "triton":
        from hasten.ops.norm import kernel

        return kernel.norm_with_residual(x, weight, config)
    return reference.norm(x, weight, config), x


def add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    config: NormConfig,
    backend: Backend | None = None,
) -> torch.Tensor:
    """residual + norm(x): for a branch that is normed before it joins the stream. weight (D,); residual of x's shape, of the norm's
    dtype. Gradients: x, weight, residual."""
    normed_dtype = x.dtype if config.fp32_weight else torch.promote_types(x.dtype, weight.dtype)
    if backend_for(x, backend) == "triton" and residual.dtype == normed_dtype:
        from hasten.ops.norm import kernel

        return kernel.add_norm(x, weight, residual, config)
    return residual + norm(x, weight, config, backend)


@dataclass(frozen=True)
class NormInput:
    """What a normed tensor is made from: an op that needs it again in its backward keeps this, and not the normed tensor.

    x (..., D), weight and config as in `norm`, both tensors without gradient.
    """

    x: torch.Tensor
    weight: torch.Tensor
    config: NormConfig

    def recompute(self) -> torch.Tensor:
        """The normed tensor, made anew."""
        with torch.no_grad():
            return norm(self.x, self.weight, self.config)
