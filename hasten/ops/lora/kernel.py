"""LoRA that costs little: products by cuBLAS, what lies between them in few passes, gradients straight into fp32.

- All A matrices that read one input are one product, and so are their gradients.
- B's share is added by the product itself (beta = 1), not by a pass of its own.
- The backward of the MLP writes the gradients of gate and up over gate and up, which its own forward allocated, and
  recomputes their product in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.glu.kernel import Share, glu_bwd, glu_fwd, lora_glu

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear


def _product_fp32(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right summed in fp32, in `dtype`: no 16-bit rounding on the way into an fp32 gradient."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32).to(dtype)
    return (left @ right).to(dtype)


def _project(
    x: torch.Tensor, linear: LoraLinear, xa: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The linear's output, on top of `residual` where given: the product adds it, no pass does."""
    weight = linear.weight.dense(x.dtype)
    if residual is not None:
        y = torch.addmm(residual, x, weight.T)
        if linear.bias is not None:
            y += linear.bias.to(x.dtype)
    elif linear.bias is not None:
        y = torch.addmm(linear.bias.to(x.dtype), x, weight.T)
    else:
        y = torch.mm(x, weight.T)
    if xa is not None and linear.b is not None:
        y.addmm_(xa, linear.b.to(x.dtype).T, alpha=linear.scale)
    return y


def _stack_a(linears: Sequence[LoraLinear], dtype: torch.dtype) -> torch.Tensor | None:
    parts = [linear.a for linear in linears if linear.a is not None]
    return torch.cat(parts).to(dtype) if parts else None


def _split(stacked: torch.Tensor | None, linears: Sequence[LoraLinear]) -> list[torch.Tensor | None]:
    """The columns of x @ A.T that belong to each linear."""
    parts, start = [], 0
    for linear in linears:
        rank = 0 if linear.a is None else linear.a.shape[0]
        parts.append(stacked[:, start : start + rank] if stacked is not None and rank else None)
        start += rank
    return parts


def _down_gradients(
    dys: Sequence[torch.Tensor], xa: list[torch.Tensor | None], linears: Sequence[LoraLinear]
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """d(x @ A.T) of all linears side by side, and each B's gradient."""
    d_xa, d_bs = [], []
    for dy, own, linear in zip(dys, xa, linears, strict=True):
        if own is None or linear.b is None:
            d_bs.append(None)
            continue
        d_xa.append(dy @ (linear.b * linear.scale).to(dy.dtype))
        d_bs.append(_product_fp32((own * linear.scale).T, dy, linear.b.dtype).T)
    return (torch.cat(d_xa, dim=1) if d_xa else None), d_bs


def _input_gradient(
    dys: Sequence[torch.Tensor], linears: Sequence[LoraLinear], d_xa: torch.Tensor | None, a: torch.Tensor | None
) -> torch.Tensor:
    dx = None
    for dy, linear in zip(dys, linears, strict=True):
        weight = linear.weight.dense(dy.dtype)
        dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    assert dx is not None
    return dx if d_xa is None or a is None else dx.addmm_(d_xa, a)


def _a_gradients(
    d_xa: torch.Tensor | None, x: torch.Tensor, linears: Sequence[LoraLinear]
) -> list[torch.Tensor | None]:
    if d_xa is None:
        return [None] * len(linears)
    dtype = next(linear.a.dtype for linear in linears if linear.a is not None)
    stacked = _product_fp32(d_xa.T, x, dtype)
    return [None if part is None else part.T for part in _split(stacked.T, linears)]


def _pairs(linears: Sequence[LoraLinear]) -> list[torch.Tensor | None]:
    return [t for linear in linears for t in (linear.a, linear.b)]


class LoraLinearsFunction(torch.autograd.Function):
    """Saves x and x @ A.T; A and B come in as arguments only so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, linears: Any, *_: Any) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        a = _stack_a(linears, x.dtype)
        xa = None if a is None else flat @ a.T
        base = None if residual is None else residual.reshape(-1, residual.shape[-1])
        outs = [_project(flat, linear, own, base) for linear, own in zip(linears, _split(xa, linears), strict=True)]
        ctx.save_for_backward(flat if xa is not None else None, xa, a)
        ctx.linears, ctx.shape, ctx.has_residual = linears, x.shape, residual is not None
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        flat, xa, a = ctx.saved_tensors
        linears = ctx.linears
        dys = [g.reshape(-1, g.shape[-1]) for g in grads]
        d_xa, d_bs = _down_gradients(dys, _split(xa, linears), linears)
        dx = _input_gradient(dys, linears, d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_as = _a_gradients(d_xa, flat, linears)
        d_residual = grads[0] if ctx.has_residual else None
        return dx, d_residual, None, *(t for pair in zip(d_as, d_bs, strict=True) for t in pair)


def _shares(xa: torch.Tensor | None, linears: Sequence[LoraLinear]) -> tuple[Share, Share] | None:
    """What the activation kernel adds to gate and up, where both have a LoRA."""
    parts = _split(xa, linears)
    found = [
        (own, linear.b.to(own.dtype), linear.scale)
        for own, linear in zip(parts, linears, strict=True)
        if own is not None and linear.b is not None
    ]
    return (found[0], found[1]) if len(found) == 2 else None


class LoraMlpFunction(torch.autograd.Function):
    """Saves x, the x @ A.T, and gate and up, over which the backward writes.

    Where gate and up both have a LoRA, what is kept are their base products: the activation kernel adds B's share in
    registers, forward and backward.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, linears: Any, activation: str, *_: Any
    ) -> torch.Tensor:
        gate, up, down = linears
        flat = x.reshape(-1, x.shape[-1])
        a = _stack_a((gate, up), x.dtype)
        xa = None if a is None else flat @ a.T
        shares = _shares(xa, (gate, up))
        adds = (None, None) if shares is not None else _split(xa, (gate, up))
        gated = [_project(flat, linear, own) for linear, own in zip((gate, up), adds, strict=True)]
        product = glu_fwd(*gated, activation) if shares is None else lora_glu(*gated, shares, activation)
        assert product is not None
        a_down = _stack_a((down,), x.dtype)
        pa = None if a_down is None else product @ a_down.T
        base = None if residual is None else residual.reshape(-1, residual.shape[-1])
        out = _project(product, down, pa, base)
        ctx.save_for_backward(flat if xa is not None else None, xa, a, pa, a_down, *gated)
        ctx.linears, ctx.activation, ctx.shape, ctx.spent = linears, activation, x.shape, False
        ctx.has_residual = residual is not None
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if ctx.spent:
            raise RuntimeError("lora_mlp's backward ran already and overwrote what it had kept; run the forward again")
        ctx.spent = True
        flat, xa, a, pa, a_down, gate_out, up_out = ctx.saved_tensors
        gate, up, down = ctx.linears
        dy = grad.reshape(-1, grad.shape[-1])
        d_pa, (d_b_down,) = _down_gradients([dy], [pa], [down])
        d_product = _input_gradient([dy], [down], d_pa, a_down)
        shares = _shares(xa, (gate, up))
        if shares is not None:
            product = lora_glu(gate_out, up_out, shares, ctx.activation, d_product, write_out=d_pa is not None)
        else:
            product = torch.empty_like(d_product) if d_pa is not None else None
            glu_bwd(d_product, gate_out, up_out, ctx.activation, (gate_out, up_out), product)
        d_a_down = _a_gradients(d_pa, product, [down])[0] if product is not None else None
        del d_product, product
        dys = [gate_out, up_out]
        d_xa, (d_b_gate, d_b_up) = _down_gradients(dys, _split(xa, (gate, up)), (gate, up))
        dx = _input_gradient(dys, (gate, up), d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_a_gate, d_a_up = _a_gradients(d_xa, flat, (gate, up))
        d_residual = grad if ctx.has_residual else None
        return dx, d_residual, None, None, d_a_gate, d_b_gate, d_a_up, d_b_up, d_a_down, d_b_down


def lora_linears(
    x: torch.Tensor, linears: Sequence[LoraLinear], residual: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    return LoraLinearsFunction.apply(x, residual, tuple(linears), *_pairs(linears))  # pyright: ignore[reportReturnType]


def lora_mlp(
    x: torch.Tensor,
    linears: tuple[LoraLinear, LoraLinear, LoraLinear],
    activation: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return LoraMlpFunction.apply(x, residual, linears, activation, *_pairs(linears))  # pyright: ignore[reportReturnType]
