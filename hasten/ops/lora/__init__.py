"""Linears with LoRA (Hu et al. 2021, arXiv:2106.09685) over frozen weights of any storage, and the gated MLP made of them.

y_i == x @ W_i.T + bias_i + scale_i * (x @ A_i.T) @ B_i.T            lora_linears(x, linears)
y   == down(act(gate(x)) * up(x)), each of the three as above        lora_mlp(x, gate, up, down, activation)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.lora import reference


class FrozenWeight(Protocol):
    """A frozen (out, in) matrix in whatever storage."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix itself in `dtype`, possibly in a buffer that the next call reuses: use it before asking again."""
        ...


@dataclass(frozen=True)
class LoraLinear:
    """One Linear. bias (out,). a (R, in), b (out, R): None = no LoRA. Only a and b train."""

    weight: FrozenWeight
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0


def lora_linears(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    residual: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, ...]:
    """Every linear's output for one input that they share, on top of `residual` (..., out) where given (one linear then).

    x: (..., in), of the dtype to multiply in. Returns one (..., out_i) of x's dtype each. Gradients: x, residual, every a and b (in
    their own dtype, summed in fp32).
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora import kernel

        return kernel.lora_linears(x, linears, residual)
    return reference.lora_linears(x, linears, residual)


def lora_mlp(
    x: torch.Tensor,
    linears: tuple[LoraLinear, LoraLinear, LoraLinear],
    activation: str,
    residual: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """The gated MLP, on top of `residual` (..., E) where given; linears: gate, up, down. x: (..., E). Keeps gate and up for the backward, recomputes their product.

    Gradients as in `lora_linears`.
    """
    if backend_for(x, backend) == "triton":
        from hasten.ops.lora import kernel

        return kernel.lora_mlp(x, linears, activation, residual)
    return reference.lora_mlp(x, linears, activation, residual)
