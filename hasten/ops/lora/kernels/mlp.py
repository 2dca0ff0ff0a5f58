"""The gated MLP: gate and up in one buffer, over which the backward writes their gradients, the activation acts again.

Two Functions: the first one keeps all there is to keep and has the whole backward; the second one, the last product, keeps
nothing. So a layer that is recomputed stops before that product (torch's checkpoint stops once it has all kept tensors).
Between them runs a `grad_anchor`: a tensor of the output's shape without memory of its own, whose gradient is the output's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.glu.kernel import glu_bwd, glu_fwd
from hasten.ops.lora.kernels.linear import SavedInput, input_gradient, low_rank, needs_input, project, thin_gradients
from hasten.ops.lora.stacked import adapters, check_versions, parameter_gradients, parameters, versions, widths
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear
    from hasten.ops.norm import NormInput


class GateUpActivations(NamedTuple):
    """What the forward makes of its rows and the backward reads: gu (N, 2F) gate and up side by side, for them and for down
    x @ A.T, A and scaled B of `low_rank`."""

    xa: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    gu: torch.Tensor
    pa: torch.Tensor | None
    a_down: torch.Tensor | None
    b_down: torch.Tensor | None


def gate_up_forward(
    flat: torch.Tensor, linears: Sequence[LoraLinear], activation: str
) -> tuple[torch.Tensor, GateUpActivations]:
    """(act(gate) * up (N, F), what was acts on the way) of the input's rows (N, E); all there is to do before the last product."""
    xa, a, b = low_rank(flat, linears[:2])
    gu = project(flat, linears[:2], xa, b)
    product = glu_fwd(*gu.chunk(2, dim=1), activation)
    return product, GateUpActivations(xa, a, b, gu, *low_rank(product, linears[2:]))


def recompute_gate_up(flat: torch.Tensor, linears: Sequence[LoraLinear], pa: torch.Tensor | None) -> GateUpActivations:
    """What `gate_up_forward` acts of the same rows, without the product: pa is at hand."""
    xa, a, b = low_rank(flat, linears[:2])
    found = adapters(linears[2:], flat.dtype)
    return GateUpActivations(
        xa, a, b, project(flat, linears[:2], xa, b), pa, *((None, None) if found is None else (found.a, found.b))
    )


def gate_up_backward(
    dy: torch.Tensor, acts: GateUpActivations, down: Sequence[LoraLinear], activation: str, wants_product: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor]]:
    """Writes the gradients of gate and up over `acts.gu`. Returns what down's own gradients are acts of, beside dy: its input
    act(gate) * up acts again (None where it is not wanted), d(input @ A.T) and d(B)."""
    halves = acts.gu.chunk(2, dim=1)
    d_pa, d_b = thin_gradients(down, dy, acts.pa, acts.b_down)
    d_product = input_gradient(dy, down, d_pa, acts.a_down)
    product = d_product if wants_product else None  # which takes its gradient's place
    glu_bwd(d_product, *halves, activation, halves, product)
    return product, d_pa, d_b


class LoraGluFunction(torch.autograd.Function):
    """(product, product @ A.T and B of down's LoRA or None, grad_anchor)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm_input: Any, linears: Any, activation: str, *_: Any) -> Any:
        ctx.set_materialize_grads(False)  # nobody wants zeros of the product's size
        flat = flat_rows(x)
        product, acts = gate_up_forward(flat, linears, activation)
        ctx.save_for_backward(*SavedInput.tensors(flat, norm_input, needs_input(linears[:2])), *acts)
        ctx.linears, ctx.rule, ctx.activation, ctx.shape = linears, SavedInput.rule(norm_input), activation, x.shape
        ctx.spent, ctx.versions = False, versions(linears)
        ctx.mark_non_differentiable(*(t for t in (product, acts.pa, acts.b_down) if t is not None))
        return product, acts.pa, acts.b_down, grad_anchor_of(flat, linears)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _product: Any, _pa: Any, _b: Any, grad: torch.Tensor | None) -> Any:
        if grad is None:
            return (None,) * (4 + 4 * len(ctx.linears))
        if ctx.spent:
            raise RuntimeError("lora_mlp's backward ran already and overwrote what it had kept; run the forward again")
        ctx.spent = True
        check_versions(ctx.linears, ctx.versions)
        source, norm_weight, *kept = ctx.saved_tensors
        acts = GateUpActivations(*kept)
        both, down, dy = ctx.linears[:2], ctx.linears[2:], flat_rows(grad)
        product_and_thin = gate_up_backward(dy, acts, down, ctx.activation, needs_input(down))
        d_down = parameter_gradients(down, dy, *product_and_thin)
        del product_and_thin
        d_gu = acts.gu
        d_xa, d_b = thin_gradients(both, d_gu, acts.xa, acts.b)
        dx = input_gradient(d_gu, both, d_xa, acts.a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = SavedInput.rows(source, norm_weight, ctx.rule, dy.dtype)
        return dx, None, None, None, *parameter_gradients(both, d_gu, flat, d_xa, d_b), *d_down


def grad_anchor_of(flat: torch.Tensor, linears: Sequence[LoraLinear]) -> torch.Tensor:
    """The output's rows (N, E) without memory: what the last Function's gradient runs along to the one that has the backward."""
    return flat.new_empty(1).expand(len(flat), sum(widths(linears[2:])))


class DownFunction(torch.autograd.Function):
    """The last product, on top of a residual where given. All gradients but the residual's are acts behind `grad_anchor`."""

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
    norm_input: NormInput | None,
) -> torch.Tensor:
    *inner, grad_anchor = LoraGluFunction.apply(x, norm_input, tuple(linears), activation, *parameters(linears))  # pyright: ignore[reportGeneralTypeIssues]
    out: torch.Tensor = DownFunction.apply(grad_anchor, *inner, residual, linears[2])  # pyright: ignore[reportAssignmentType]
    return out.view(*x.shape[:-1], out.shape[-1])
