"""The gated MLP: gate and up in one buffer, over which the backward writes their gradients, the activation made again.

Two Functions: the first one keeps all there is to keep and has the whole backward; the second one, the last product, keeps
nothing. So a layer that is recomputed stops before that product (torch's checkpoint stops once it has all kept tensors).
Between them runs a `thread`: a tensor of the output's shape without memory of its own, whose gradient is the output's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.glu.kernel import glu_bwd, glu_fwd
from hasten.ops.lora.joint import parameter_gradients, parameters, widths
from hasten.ops.lora.kernel import Kept, input_gradient, low_rank, needs_input, project, thin_gradients
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear
    from hasten.ops.norm import NormInput


class LoraGluFunction(torch.autograd.Function):
    """(product, product @ A.T and B of down's LoRA or None, thread)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, made_from: Any, linears: Any, activation: str, *_: Any) -> Any:
        ctx.set_materialize_grads(False)  # nobody wants zeros of the product's size
        flat, down = flat_rows(x), linears[2:]
        xa, a, b = low_rank(flat, linears[:2])
        gu = project(flat, linears[:2], xa, b)
        product = glu_fwd(*gu.chunk(2, dim=1), activation)
        pa, a_down, b_down = low_rank(product, down)
        kept = Kept.tensors(flat, made_from, needs_input(linears[:2]))
        ctx.save_for_backward(*kept, xa, a, b, pa, a_down, b_down, gu)
        ctx.linears, ctx.rule, ctx.activation, ctx.shape = linears, Kept.rule(made_from), activation, x.shape
        ctx.spent = False
        ctx.mark_non_differentiable(*(t for t in (product, pa, b_down) if t is not None))
        return product, pa, b_down, product.new_empty(1).expand(len(flat), sum(widths(down)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _product: Any, _pa: Any, _b: Any, grad: torch.Tensor | None) -> Any:
        if grad is None:
            return (None,) * (4 + 4 * len(ctx.linears))
        if ctx.spent:
            raise RuntimeError("lora_mlp's backward ran already and overwrote what it had kept; run the forward again")
        ctx.spent = True
        source, norm_weight, xa, a, b, pa, a_down, b_down, gu = ctx.saved_tensors
        both, down = ctx.linears[:2], ctx.linears[2:]
        dy, halves = flat_rows(grad), gu.chunk(2, dim=1)
        d_pa, d_b_down = thin_gradients(down, dy, pa, b_down)
        d_product = input_gradient(dy, down, d_pa, a_down)
        product = d_product if needs_input(down) else None  # which takes its gradient's place
        glu_bwd(d_product, *halves, ctx.activation, halves, product)
        d_down = parameter_gradients(down, dy, product, d_pa, d_b_down)
        del product, d_product
        d_xa, d_b = thin_gradients(both, gu, xa, b)
        dx = input_gradient(gu, both, d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = Kept.rows(source, norm_weight, ctx.rule, dy.dtype)
        return dx, None, None, None, *parameter_gradients(both, gu, flat, d_xa, d_b), *d_down


class DownFunction(torch.autograd.Function):
    """The last product, on top of a residual where given. All gradients but the residual's are made behind `thread`."""

    @staticmethod
    def forward(ctx: Any, _thread: Any, product: Any, pa: Any, b: Any, residual: Any, down: LoraLinear) -> torch.Tensor:
        ctx.shape = None if residual is None else residual.shape
        return project(product, (down,), pa, b, None if residual is None else flat_rows(residual))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, None, None, None, None if ctx.shape is None else dy.view(ctx.shape), None


def lora_mlp(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    activation: str,
    residual: torch.Tensor | None,
    made_from: NormInput | None,
) -> torch.Tensor:
    *inner, thread = LoraGluFunction.apply(x, made_from, tuple(linears), activation, *parameters(linears))  # pyright: ignore[reportGeneralTypeIssues]
    out: torch.Tensor = DownFunction.apply(thread, *inner, residual, linears[2])  # pyright: ignore[reportAssignmentType]
    return out.view(*x.shape[:-1], -1)
