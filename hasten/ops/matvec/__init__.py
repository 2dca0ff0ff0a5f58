"""Linears of one token: matrices times a vector, memory-bound, so what counts is the bandwidth at which weights are read.

y_i == W_i @ x + bias_i + scale_i * (b_i @ xa_i)             matvecs(parts, x, xa); xa_i = A_i @ x of a LoRA, from split_matvecs
y   == cat(y_1, y_2, ...) + residual
y   == act(y_1) * y_2                                        with an activation: gate and up of an MLP

One launch reads all matrices. O output channels, E input channels, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.matvec import reference

W = TypeVar("W")


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix stored as codes with one scale per output channel: W[o] == codes[o] * scales[o].

    codes: (O, E) int8 or an 8-bit floating dtype. scales: (O,) fp32.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


@dataclass(frozen=True)
class Part(Generic[W]):
    """One matrix of those that a call multiplies with x, and what is added to its product.

    weight: (O, E), a tensor of any floating dtype with contiguous channels, or a `ScaledMatrix`. bias: (O,).
    b: (O, R) of a LoRA, contiguous; its R entries of `xa` follow those of the parts before it. scale: of b @ xa.
    """

    weight: W
    bias: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.b is None else self.b.shape[1]


def matvecs(
    parts: Sequence[Part[torch.Tensor] | Part[ScaledMatrix]],
    x_E: torch.Tensor,
    xa_SR: torch.Tensor | None = None,
    residual_O: torch.Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Returns y (all O,), summed in fp32. No gradients.

    parts: of one kind of weight. x_E: (E,), contiguous. xa_SR: (S, all ranks) fp32, contiguous, summed over S (see `split_matvecs`). residual_O: (all O,). activation: a name in
    `ops.glu.ACTIVATIONS`, with two parts and without a residual; then y has the O of one. dtype: of the result, default x's.
    """
    dtype = x_E.dtype if dtype is None else dtype
    if backend_for(x_E, backend) == "triton":
        from hasten.ops.matvec.kernels import dense

        return dense.matvecs(parts, x_E, xa_SR, residual_O, activation, dtype)
    products = [reference.product(part.weight, x_E) for part in parts]
    return reference.finish(products, parts, xa_SR, residual_O, activation, dtype, x_E.dtype)


def split_matvecs(
    parts: Sequence[Part[torch.Tensor]], x_E: torch.Tensor, splits: int, backend: Backend | None = None
) -> torch.Tensor:
    """Returns (splits, all O) fp32, whose sum over splits is W_i @ x: each is the sum over a part of the input channels.

    For matrices with few output channels, as A of a LoRA: one program per row would be too few. splits: a power of two. No gradients.
    """
    if backend_for(x_E, backend) == "triton":
        from hasten.ops.matvec.kernels import dense

        return dense.split_matvecs(parts, x_E, splits)
    chunk = -(-x_E.shape[0] // splits)
    pieces = [slice(start, start + chunk) for start in range(0, chunk * splits, chunk)]
    return torch.stack(
        [torch.cat([reference.product(part.weight[:, one], x_E[one]) for part in parts]) for one in pieces]
    )


def matvec(weight_OE: torch.Tensor, x_E: torch.Tensor, backend: Backend | None = None) -> torch.Tensor:
    """Returns W @ x (O,) in x's dtype, see `matvecs`."""
    return matvecs([Part(weight_OE)], x_E, backend=backend)
