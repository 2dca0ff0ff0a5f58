"""The gated MLP: gate and up in one buffer, over which the backward writes their gradients.

Where gate and up both have a LoRA of moderate rank, what is kept are their base products, and `gated` adds B's share in
registers and makes every thin gradient in the one pass of the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.glu.kernel import glu_bwd, glu_fwd
from hasten.ops.lora.gated.kernel import MAX_RANK, Share, ThinGradients, lora_glu_bwd, lora_glu_fwd
from hasten.ops.lora.joint import parameter_gradients, parameters, ranks
from hasten.ops.lora.kernel import Kept, flat_rows, input_gradient, needs_input, project, thin_gradients

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear
    from hasten.ops.norm import NormInput


def _in_registers(linears: Sequence[LoraLinear]) -> bool:
    frozen = all(one.trained_weight is None and one.trained_bias is None and one.bias is None for one in linears)
    moderate = all(0 < rank <= MAX_RANK for rank in ranks(linears[:2])) and ranks(linears[2:])[0] <= MAX_RANK
    return frozen and moderate


def _shares(xa_NR: torch.Tensor, b_RO: torch.Tensor, linears: Sequence[LoraLinear]) -> tuple[Share, Share]:
    rank, width = ranks(linears)[0], linears[0].weight.shape[0]
    return Share(xa_NR[:, :rank], b_RO[:rank, :width].contiguous()), Share(
        xa_NR[:, rank:], b_RO[rank:, width:].contiguous()
    )


class LoraMlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, made_from: Any, linears: Any, activation: str, *_: Any
    ) -> torch.Tensor:
        flat, width = flat_rows(x), linears[0].weight.shape[0]
        in_registers = _in_registers(linears)
        gu, xa, found = project(flat, linears[:2], share=not in_registers)
        ab = (None, None) if found is None else (found.a, found.b)
        if in_registers and found is not None and xa is not None:
            product = lora_glu_fwd(gu[:, :width], gu[:, width:], *_shares(xa, found.b, linears), activation)
        else:
            product = glu_fwd(gu[:, :width], gu[:, width:], activation)
        out, pa, down = project(product, linears[2:], None if residual is None else flat_rows(residual))
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
        dy = flat_rows(grad)
        d_pa, d_b_down = thin_gradients(dy, pa, b_down)
        if _in_registers(ctx.linears):
            d_product = input_gradient(dy, down, None, None)
            thin = _backward_in_registers(ctx, d_product, gu, xa, b, d_pa, a_down)
            d_xa, d_b = torch.cat((thin.xa_gate, thin.xa_up), dim=1), torch.block_diag(thin.b_gate, thin.b_up)
            d_down = parameter_gradients(down, dy, None, None, None)
            if thin.a_down is not None:
                d_down[0], d_down[1] = thin.a_down.to(down[0].a.dtype), (d_b_down * down[0].scale).T.to(down[0].b.dtype)
        else:
            d_product = input_gradient(dy, down, d_pa, a_down)
            product = torch.empty_like(d_product) if needs_input(down) else None
            halves = gu.chunk(2, dim=1)
            glu_bwd(d_product, *halves, ctx.activation, halves, product)
            d_down = parameter_gradients(down, dy, product, d_pa, d_b_down)
            del product
            d_xa, d_b = thin_gradients(gu, xa, b)
        del d_product
        dx = input_gradient(gu, both, d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = Kept.rows(source, norm_weight, ctx.rule)
        d_both = parameter_gradients(both, gu, flat, d_xa, d_b)
        return dx, grad if ctx.has_residual else None, None, None, None, *d_both, *d_down


def _backward_in_registers(  # noqa: PLR0917
    ctx: Any, d_product: torch.Tensor, gu: torch.Tensor, xa: Any, b: Any, d_pa: Any, a_down: Any
) -> ThinGradients:
    gate, up = gu.chunk(2, dim=1)
    down = None if d_pa is None else Share(d_pa, a_down)
    return lora_glu_bwd(d_product, gate, up, *_shares(xa, b, ctx.linears), down, ctx.activation)


def lora_mlp(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    activation: str,
    residual: torch.Tensor | None,
    made_from: NormInput | None,
) -> torch.Tensor:
    return LoraMlpFunction.apply(x, residual, made_from, tuple(linears), activation, *parameters(linears))  # pyright: ignore[reportReturnType]
