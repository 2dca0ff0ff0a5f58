"""Linears with LoRA (Hu et al. 2021, arXiv:2106.09685) over a frozen or trained base weight in any storage format.

y_i == x @ W_i.T + bias_i + scale_i * (x @ A_i.T) @ B_i.T            lora_linears(x, linears)
q, k == rope(norm(q)), rope(norm(k)) of the first two of them       lora_qkv(x, (q, k, v), heads)
y   == down(act(gate(x)) * up(x)), each of the three as above        lora_mlp(x, (gate, up, down), activation)

B batch, T tokens of a sequence, N tokens in all, E input channels, O output channels, F intermediate channels of the MLP,
H heads, D channels of a head, R rank. A LoRA's own term, scale * (x @ A.T) @ B.T, is called its delta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.lora import reference
from hasten.ops.lora.weight import DenseWeight, Weight
from hasten.ops.norm import NormInput
from hasten.ops.rope import QKNorm, qk_rope

__all__ = [
    "DenseWeight",
    "HeadsConfig",
    "LoraLinear",
    "Weight",
    "is_one_token",
    "lora_linears",
    "lora_mlp",
    "lora_qkv",
]


@dataclass(frozen=True)
class LoraLinear:
    """One Linear and its LoRA.

    weight: (out, in). bias: (out,). a: (R, in), b: (out, R); None = no LoRA. scale: alpha / r, or alpha / sqrt(r) (rsLoRA).
    a and b always train. The weight trains where its stored tensor requires a gradient, the bias where it does.
    """

    weight: Weight
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def trained_weight(self) -> torch.Tensor | None:
        stored = self.weight.stored
        return stored if stored is not None and stored.requires_grad else None

    @property
    def trained_bias(self) -> torch.Tensor | None:
        return self.bias if self.bias is not None and self.bias.requires_grad else None


def is_one_token(x: torch.Tensor) -> bool:
    """Returns whether x (..., E) is a single token of a forward without gradients, which matrix-vector kernels run."""
    return x.shape[-1] == x.numel() and not torch.is_grad_enabled()


def lora_linears(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    residual: torch.Tensor | None = None,
    norm_input: NormInput | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, ...]:
    """Runs all linears that read one input, as one matmul; adds `residual` inside that matmul (addmm).

    x: (..., in), in the dtype to multiply in. residual: (..., out), with a single linear only.
    norm_input: the input of the norm that produced x. If given, the backward recomputes x from it and x is not saved.
    Returns one (..., out_i) per linear, in x's dtype; they may be slices of one buffer, side by side.
    Gradients: x, residual, every a and b, weights and biases that train (each in its own dtype, summed in fp32).
    Raises RuntimeError in the backward if a weight was changed in place since the forward.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora.kernels import linear as kernel
        from hasten.ops.lora.kernels import one_token

        if is_one_token(x):
            return one_token.lora_linears(x, linears, residual)
        return kernel.lora_linears(x, linears, residual, norm_input)
    return reference.lora_linears(x, linears, residual)


@dataclass(frozen=True)
class HeadsConfig:
    """How q, k and v become heads. dim: channels per head. position: cos and sin, each (B or 1, T, D), or None = no rotation.
    rotation, fp32, qk_norm: as in `ops.rope.qk_rope`."""

    dim: int
    position: tuple[torch.Tensor, torch.Tensor] | None = None
    rotation: Literal["half", "interleaved"] = "half"
    fp32: bool = False
    qk_norm: QKNorm | None = None


def lora_qkv(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    heads: HeadsConfig,
    norm_input: NormInput | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projects x to queries, keys and values; applies the q/k norm and the rotary embedding to q and k.

    x: (B, T, E). linears: q, k, v. Returns three (B, T, H_i, D) in x's dtype; they may be slices of one buffer whose heads
    and channels are contiguous. norm_input and gradients: as in `lora_linears`; also the weights of the q/k norm.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora.kernels import one_token
        from hasten.ops.lora.kernels import qkv as kernel

        if is_one_token(x):
            q, k, v = (part.unflatten(-1, (-1, heads.dim)) for part in one_token.lora_linears(x, linears, None))
            return *qk_rope(q, k, heads.position, heads.rotation, heads.fp32, heads.qk_norm, "triton"), v
        return kernel.lora_qkv(x, linears, heads, norm_input)
    return reference.lora_qkv(x, linears, heads)


def lora_mlp(
    x: torch.Tensor,
    linears: tuple[LoraLinear, LoraLinear, LoraLinear],
    activation: str,
    residual: torch.Tensor | None = None,
    norm_input: NormInput | None = None,
    tile: int | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Runs the gated MLP; adds `residual` inside the last matmul (addmm).

    x, residual: (..., E). linears: gate, up, down. activation: a name in `ops.glu.ACTIVATIONS`.
    tile: None = saves the outputs of gate and up; the backward recomputes the activation and overwrites them with their
    gradients, so it runs once. A number = processes that many tokens at a time, forward and backward; saves only the input
    and recomputes gate and up. Then no buffer of width F is longer than a tile.
    Returns (..., E) in x's dtype. norm_input and gradients: as in `lora_linears`.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora.kernels import mlp as kernel
        from hasten.ops.lora.kernels import one_token
        from hasten.ops.lora.kernels import tiled_mlp as tiled

        if is_one_token(x):
            return one_token.lora_mlp(x, linears, activation, residual)
        if tile is not None:
            return tiled.lora_mlp(x, linears, activation, residual, norm_input, tile)
        return kernel.lora_mlp(x, linears, activation, residual, norm_input)
    return reference.lora_mlp(x, linears, activation, residual, tile)
