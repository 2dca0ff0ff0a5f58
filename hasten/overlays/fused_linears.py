"""Chooses between a projection's own forward and the fused LoRA ops, in each call, since adapters may change.

The ops run on a GPU if each projection is a plain weight, frozen or not, with at most one plain LoRA. Otherwise
`weights.read_linear` gives the reason, which the report shows.
"""

from collections.abc import Callable
from typing import Any

import torch

from hasten.ops import NormInput, qk_rope
from hasten.ops.backend import backend_for
from hasten.ops.lora import HeadsConfig, LoraLinear, lora_linears, lora_qkv
from hasten.overlays.precision import compute_dtype
from hasten.weights import read_linear


def fused_input(
    x: torch.Tensor, modules: tuple[Any, ...], training: bool
) -> tuple[torch.Tensor, tuple[LoraLinear, ...]] | None:
    """Returns (x in the matmul's dtype, the linears), or None where the modules' own forwards must run."""
    if backend_for(x) != "triton":
        return None
    found = []
    for module in modules:
        linear = read_linear(module, training)
        if isinstance(linear, str):
            return None
        found.append(linear)
    return x.to(compute_dtype(x)), tuple(found)


def linear(x: torch.Tensor, module: Any, training: bool, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Computes module(x), plus `residual` if given, for x (..., in): by the fused op, or by the module's own
    forward."""
    fused = fused_input(x, (module,), training)
    if fused is None:
        return module(x) if residual is None else residual + module(x)
    return lora_linears(*fused, residual)[0]


def qkv(
    x: torch.Tensor,
    modules: tuple[Any, Any, Any],
    training: bool,
    heads: HeadsConfig,
    norm_input: NormInput | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projects x (B, T, E) to q, k and v (B, T, H, D), with q/k norm and RoPE applied.

    norm_input: the input of the norm that produced x; the fused op saves it instead of x and recomputes the norm in the
    backward.
    """
    fused = fused_input(x, modules, training)
    if fused is not None:
        return lora_qkv(*fused, heads, norm_input)
    q, k, v = (module(x).unflatten(-1, (-1, heads.dim)) for module in modules)
    return *qk_rope(q, k, heads.position, heads.rotation, heads.fp32, heads.qk_norm), v


def projected(
    x: torch.Tensor, modules: tuple[Any, Any, Any], training: bool, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projects x (B, T, E) to q, k and v (B, T, H, D), without q/k norm and RoPE. dim: channels of a head."""
    fused = fused_input(x, modules, training)
    found = lora_linears(*fused) if fused is not None else tuple(module(x) for module in modules)
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in found)
    return q, k, v


def qkv_through_norms(
    x: torch.Tensor,
    modules: tuple[Any, Any, Any],
    heads: HeadsConfig,
    normed: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Does what `qkv` does, with every module's own forward, and with cos and sin that may be any numbers. normed: calls
    the norms on q and k, each (B, T, H, D)."""
    q, k, v = (module(x).unflatten(-1, (-1, heads.dim)) for module in modules)
    return *qk_rope(*normed(q, k), heads.position, heads.rotation, heads.fp32, backend="reference"), v
