"""The gated MLP: gate and up in one buffer, over which the backward writes their gradients, the activation made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.glu.kernel import glu_bwd, glu_fwd
from hasten.ops.lora.joint import parameter_gradients, parameters
from hasten.ops.lora.kernel import Kept, flat_rows, input_gradient, needs_input, project, thin_gradients

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear
    from hasten.ops.norm import NormInput


class LoraMlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, made_from: Any, linears: Any, activation: str, *_: Any
    ) -> torch.Tensor:
        flat = flat_rows(x)
        gu, xa, found = project(flat, linears[:2])
        product = glu_fwd(*gu.chunk(2, dim=1), activation)
        out, pa, down = project(product, linears[2:], None if residual is None else flat_rows(residual))
        ab = (None, None) if found is None else (found.a, found.b)
        ab_down = (None, None) if down is None else (down.a, down.b)
        ctx.save_for_backward(*Kept.tensors(flat, made_from, needs_input(linears[:2])), xa, *ab, pa, *ab_down, gu)
        ctx.linears, ctx.rule, ctx.activation, ctx.shape = linears, Kept.rule(made_from), activation, x.shape
        ctx.has_residual, ctx.spent = residual is not None, False
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.spent:
            raise RuntimeError("lora_mlp's backward ran already and overwrote what it had kept; run the forward again")
        ctx.spent = True
        source, norm_weight, xa, a, b, pa, a_down, b_down, gu = ctx.saved_tensors
        both, down = ctx.linears[:2], ctx.linears[2:]
        dy, halves = flat_rows(grad), gu.chunk(2, dim=1)
        d_pa, d_b_down = thin_gradients(down, dy, pa, b_down)
        d_product = input_gradient(dy, down, d_pa, a_down)
        product = torch.empty_like(d_product) if needs_input(down) else None
        glu_bwd(d_product, *halves, ctx.activation, halves, product)
        d_down = parameter_gradients(down, dy, product, d_pa, d_b_down)
        del product, d_product
        d_xa, d_b = thin_gradients(both, gu, xa, b)
        dx = input_gradient(gu, both, d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = Kept.rows(source, norm_weight, ctx.rule)
        d_residual = grad if ctx.has_residual else None
        return dx, d_residual, None, None, None, *parameter_gradients(both, gu, flat, d_xa, d_b), *d_down


def lora_mlp(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    activation: str,
    residual: torch.Tensor | None,
    made_from: NormInput | None,
) -> torch.Tensor:
    return LoraMlpFunction.apply(x, residual, made_from, tuple(linears), activation, *parameters(linears))  # pyright: ignore[reportReturnType]
