"""The gated MLP on a GPU: gate and up share one buffer, and the backward overwrites it with their gradients.

Two autograd Functions. `LoraGluFunction` runs everything up to the last matmul, saves all tensors and runs the whole
backward. `DownFunction` runs the last matmul and saves nothing. torch's activation checkpointing stops recomputing a
layer once every saved tensor is there, so the last matmul is not recomputed. Between the two runs a `grad_anchor`: a
tensor of the output's shape without storage of its own, whose gradient is the gradient of the output.

N tokens, E hidden size, F intermediate size. h = act(gate) * up (N, F), the input of down. xa, a, b: see
`kernels.linear`;
down_xa = h @ A.T (N, R), down_a, down_b: the same of down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.autograd import run
from hasten.ops.glu.kernel import glu_bwd, glu_fwd
from hasten.ops.lora.kernels.linear import SavedInput, input_gradient, lora_gradients, low_rank, needs_input, project
from hasten.ops.lora.stacked import adapters, check_versions, parameter_gradients, parameters, versions, widths
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear
    from hasten.ops.norm import NormInput


class GateUpActivations(NamedTuple):
    """The activations that the backward reads. gate_up: (N, 2F), the outputs of gate and up side by side."""

    xa: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    gate_up: torch.Tensor
    down_xa: torch.Tensor | None
    down_a: torch.Tensor | None
    down_b: torch.Tensor | None


def gate_up_forward(
    flat: torch.Tensor, linears: Sequence[LoraLinear], activation: str
) -> tuple[torch.Tensor, GateUpActivations]:
    """Computes (h (N, F), activations) of the input (N, E): the forward without the last matmul."""
    xa, a, b = low_rank(flat, linears[:2])
    gate_up = project(flat, linears[:2], xa, b)
    h = glu_fwd(*gate_up.chunk(2, dim=1), activation)
    return h, GateUpActivations(xa, a, b, gate_up, *low_rank(h, linears[2:]))


def recompute_gate_up(
    flat: torch.Tensor, linears: Sequence[LoraLinear], down_xa: torch.Tensor | None
) -> GateUpActivations:
    """Recomputes the activations of `gate_up_forward` without h, which only down_xa needs, and that was saved."""
    xa, a, b = low_rank(flat, linears[:2])
    found = adapters(linears[2:], flat.dtype)
    down_a, down_b = (None, None) if found is None else (found.a, found.b)
    return GateUpActivations(xa, a, b, project(flat, linears[:2], xa, b), down_xa, down_a, down_b)


def gate_up_backward(
    dy: torch.Tensor, acts: GateUpActivations, down: Sequence[LoraLinear], activation: str, needs_h: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor]]:
    """Overwrites `acts.gate_up` with the gradients of gate and up.

    Returns what `parameter_gradients` of down needs in addition to dy: h (None unless `needs_h`), d_down_xa and d_b.
    """
    halves = acts.gate_up.chunk(2, dim=1)
    d_down_xa, d_b = lora_gradients(down, dy, acts.down_xa, acts.down_b)
    d_h = input_gradient(dy, down, d_down_xa, acts.down_a)
    h = d_h if needs_h else None  # the recomputed h overwrites its gradient
    glu_bwd(d_h, *halves, activation, halves, h)
    return h, d_down_xa, d_b


class LoraGluFunction(torch.autograd.Function):
    """Returns (h, down_xa and down_b or None, grad_anchor). Saves the input and `GateUpActivations`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm_input: Any, linears: Any, activation: str, *_: Any) -> Any:
        ctx.set_materialize_grads(False)  # else autograd allocates zeros of the size of h
        flat = flat_rows(x)
        h, acts = gate_up_forward(flat, linears, activation)
        ctx.save_for_backward(*SavedInput.tensors(flat, norm_input, needs_input(linears[:2])), *acts)
        ctx.linears, ctx.activation, ctx.shape = linears, activation, x.shape
        ctx.norm_config, ctx.versions, ctx.overwritten = SavedInput.config(norm_input), versions(linears), False
        ctx.mark_non_differentiable(*(t for t in (h, acts.down_xa, acts.down_b) if t is not None))
        return h, acts.down_xa, acts.down_b, grad_anchor_of(flat, linears)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _h: Any, _down_xa: Any, _down_b: Any, grad: torch.Tensor | None) -> Any:
        if grad is None:
            return (None,) * (4 + 4 * len(ctx.linears))
        if ctx.overwritten:
            raise RuntimeError(
                "the backward of lora_mlp ran already and overwrote its saved activations: run the forward again"
            )
        ctx.overwritten = True
        check_versions(ctx.linears, ctx.versions)
        saved_x, norm_weight, *saved = ctx.saved_tensors
        acts = GateUpActivations(*saved)
        both, down, dy = ctx.linears[:2], ctx.linears[2:], flat_rows(grad)
        of_down = gate_up_backward(dy, acts, down, ctx.activation, needs_input(down))
        d_down = parameter_gradients(down, dy, *of_down)
        del of_down  # frees h
        d_gate_up = acts.gate_up
        d_xa, d_b = lora_gradients(both, d_gate_up, acts.xa, acts.b)
        dx = input_gradient(d_gate_up, both, d_xa, acts.a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = SavedInput.restore(saved_x, norm_weight, ctx.norm_config, dy.dtype)
        return dx, None, None, None, *parameter_gradients(both, d_gate_up, flat, d_xa, d_b), *d_down


def grad_anchor_of(flat: torch.Tensor, linears: Sequence[LoraLinear]) -> torch.Tensor:
    """Returns an (N, E) tensor of one element, expanded, which carries the output's gradient from the last Function to
    the one that runs the backward."""
    return flat.new_empty(1).expand(len(flat), sum(widths(linears[2:])))


class DownFunction(torch.autograd.Function):
    """h @ down (+ residual). Saves nothing: every gradient but the residual's is computed by `LoraGluFunction`, which
    `grad_anchor` leads to."""

    @staticmethod
    def forward(
        ctx: Any, _grad_anchor: Any, h: Any, down_xa: Any, down_b: Any, residual: Any, down: LoraLinear
    ) -> torch.Tensor:
        ctx.shape = None if residual is None else residual.shape
        return project(h, (down,), down_xa, down_b, None if residual is None else flat_rows(residual))

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
    *inner, grad_anchor = run(LoraGluFunction, x, norm_input, tuple(linears), activation, *parameters(linears))
    out: torch.Tensor = run(DownFunction, grad_anchor, *inner, residual, linears[2])
    return out.view(*x.shape[:-1], out.shape[-1])
