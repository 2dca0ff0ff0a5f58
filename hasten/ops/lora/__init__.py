"""Linears with LoRA (Hu et al. 2021, arXiv:2106.09685) over weights of any storage, and what is acts of them.

y_i == x @ W_i.T + bias_i + scale_i * (x @ A_i.T) @ B_i.T            lora_linears(x, linears)
q, k == rope(norm(q)), rope(norm(k)) of the first two of them       lora_qkv(x, (q, k, v), heads)
y   == down(act(gate(x)) * up(x)), each of the three as above        lora_mlp(x, (gate, up, down), activation)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.lora import reference
from hasten.ops.norm import NormInput
from hasten.ops.rope import QKNorm


class Weight(Protocol):
    """An (out, in) matrix in whatever storage. held: the tensor itself, where it is stored as it is."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def held(self) -> torch.Tensor | None: ...

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in `dtype`."""
        ...

    def write(self, out: torch.Tensor) -> None:
        """Writes the matrix into `out` (out, in), in its dtype."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """A matrix as it is."""

    held: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.shape[0], self.held.shape[1]

    @property
    def device(self) -> torch.device:
        return self.held.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.held.to(dtype)

    def write(self, out: torch.Tensor) -> None:
        out.copy_(self.held.detach())


@dataclass(frozen=True)
class LoraLinear:
    """One Linear. bias (out,). a (R, in), b (out, R): None = no LoRA. a and b always train; weight and bias where the tensors
    that they are held in ask for gradients."""

    weight: Weight
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def trained_weight(self) -> torch.Tensor | None:
        held = self.weight.held
        return held if held is not None and held.requires_grad else None

    @property
    def trained_bias(self) -> torch.Tensor | None:
        return self.bias if self.bias is not None and self.bias.requires_grad else None


def lora_linears(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    residual: torch.Tensor | None = None,
    norm_input: NormInput | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, ...]:
    """Every linear's output for one input that they share, on top of `residual` (..., out) where given (one linear then).

    x: (..., in), of the dtype to multiply in. norm_input: the norm's input that x was acts from; given, that is kept for the
    backward in place of x. Returns one (..., out_i) of x's dtype each; they may share one buffer, rows apart. Gradients: x,
    residual, every a and b, weights and biases that train (each in its own dtype, summed in fp32).
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora.kernels import linear as kernel

        return kernel.lora_linears(x, linears, residual, norm_input)
    return reference.lora_linears(x, linears, residual)


@dataclass(frozen=True)
class HeadsConfig:
    """How projections become heads: channels of a head, cos and sin (B or 1, T, D) or None, and the rest as in `qk_rope`."""

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
    """Queries, keys and values (B, T, H_i, D) of x (B, T, E): projected, q and k normed and rotated.

    linears: q, k, v. The three may share one buffer, tokens apart, heads and channels contiguous. Gradients as in
    `lora_linears`, and the q/k norm's weights.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora.kernels import qkv as kernel

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
    """The gated MLP, on top of `residual` (..., E) where given; linears: gate, up, down. x: (..., E). Keeps the products of gate
    and up for the backward, which writes over them, and makes the activation again.

    tile: so many rows at a time, forward and backward; then only the input is kept, gate and up are acts again too, and what is
    as wide as the MLP is never longer than a tile. None = all rows at once. Gradients and `norm_input` as in `lora_linears`.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora.kernels import mlp as kernel
        from hasten.ops.lora.kernels import tiled_mlp as tiled

        if tile is not None:
            return tiled.lora_mlp(x, linears, activation, residual, norm_input, tile)
        return kernel.lora_mlp(x, linears, activation, residual, norm_input)
    return reference.lora_mlp(x, linears, activation, residual, tile)
