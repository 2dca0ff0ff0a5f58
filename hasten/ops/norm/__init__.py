"""RMSNorm and LayerNorm (without bias) over the last axis.

norm(x, w, NormConfig(eps, kind, unit_offset, fp32_weight)) ==
    n = x32 * rsqrt(mean(x32 ** 2, -1) + eps)                            kind "rms"
    n = (x32 - mean(x32)) * rsqrt(var(x32, unbiased=False) + eps)        kind "layer"
    (w32 + unit_offset) * n, cast to x.dtype                             fp32_weight=True  (Gemma, Cohere)
    (w + unit_offset) * n.to(x.dtype)                                    fp32_weight=False (Llama)

norm_with_residual(x, w, config) == (norm(x, w, config), x)
add_norm(x, w, residual, config) == residual + norm(x, w, config)
"""

from dataclasses import dataclass

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.norm import reference
from hasten.ops.norm.config import NormConfig


def norm(x: torch.Tensor, weight: torch.Tensor, config: NormConfig, backend: Backend | None = None) -> torch.Tensor:
    """Normalises `x` over its last axis and scales it.

    x: (..., D), any floating dtype. weight: (D,), or (H, D) for one weight per head with x (..., H, D).
    Returns x's shape; x's dtype, or the promotion of both dtypes where config.fp32_weight is False (as transformers
    does). Gradients: x, weight. backend: None = by x's device.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.norm import kernel

        return kernel.norm(x, weight, config)
    return reference.norm(x, weight, config)


def norm_with_residual(
    x: torch.Tensor, weight: torch.Tensor, config: NormConfig, backend: Backend | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (norm(x), x), for the pre-norm of a residual branch: x is normed for the branch and also passed on.

    Fuses the sum of x's two gradients into the norm's backward. Arguments as in `norm`.
    """
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
    """Returns residual + norm(x), for a branch with a post-norm (Gemma 2); fuses the residual add into the norm.

    weight: (D,). residual: x's shape; another dtype than the norm's output takes the unfused path.
    Gradients: x, weight, residual.
    """
    normed_dtype = x.dtype if config.fp32_weight else torch.promote_types(x.dtype, weight.dtype)
    if backend_for(x, backend) == "triton" and residual.dtype == normed_dtype:
        from hasten.ops.norm import kernel

        return kernel.add_norm(x, weight, residual, config)
    return residual + norm(x, weight, config, backend)


@dataclass(frozen=True)
class NormInput:
    """The input of a norm. An op that consumes the norm's output saves this instead, and recomputes the output in its
    backward.

    The residual stream is saved anyway, so the norm's output takes no memory. x: (..., D), weight and config: as in
    `norm`; both tensors detached.
    """

    x: torch.Tensor
    weight: torch.Tensor
    config: NormConfig

    def recompute(self) -> torch.Tensor:
        """Recomputes the norm's output, without gradient."""
        with torch.no_grad():
            return norm(self.x, self.weight, self.config)
