"""The gated MLP, some tokens at a time: no buffer of the intermediate size outlives its tile, forward or backward.

Two autograd Functions, as in `kernels.mlp`, but in reverse order. `TiledBackwardFunction` comes first and computes
nothing: it saves the input and runs the whole backward, which recomputes gate and up tile by tile.
`TiledForwardFunction`
computes the output and saves nothing. So activation checkpointing, which stops at the last saved tensor, does not run
the MLP's forward a second time before the backward recomputes it anyway. Weights are dequantised once per pass, for all
tiles.

One tensor goes from forward to backward outside of autograd: down_xa (h @ A.T of down, R numbers per token), which
spares the backward the activation and a matmul over F. Autograd does not free it, so the backward does; a second
backward through
the same graph (retain_graph=True) recomputes it.

Names as in `kernels.mlp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.autograd import run
from hasten.ops.lora import DenseWeight, LoraLinear
from hasten.ops.lora.kernels.linear import SavedInput, input_gradient, lora_gradients, needs_input, project
from hasten.ops.lora.kernels.mlp import gate_up_backward, gate_up_forward, grad_anchor_of, recompute_gate_up
from hasten.ops.lora.stacked import blocks_of, check_versions, parameters, versions, weight_of, widths
from hasten.ops.precision import add_matmul, at_least_fp32
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.norm import NormInput


def tiles(tokens: int, tile: int) -> Iterator[slice]:
    """Returns slices of at most `tile` tokens; one empty slice for no tokens, so that gradients become zeros and not
    None."""
    return (slice(start, min(start + tile, tokens)) for start in range(0, max(tokens, 1), tile))


def dense_once(linears: Sequence[LoraLinear], dtype: torch.dtype) -> tuple[LoraLinear, ...]:
    """Returns the linears over weights that are dense in `dtype` and packed in one buffer, so that no tile dequantises
    them again.

    A weight with its own matmul stays as it is.
    """
    if any(one.weight.overrides_matmul for one in linears):
        return tuple(
            one if one.weight.overrides_matmul else replace(one, weight=DenseWeight(one.weight.dense(dtype).detach()))
            for one in linears
        )
    parts = weight_of(linears, dtype).detach().split(widths(linears))
    return tuple(replace(one, weight=DenseWeight(part)) for one, part in zip(linears, parts, strict=True))


class GradientSums:
    """Sums the gradients of `parameters(linears)` over tiles in at least fp32, and rounds them once."""

    def __init__(self, linears: Sequence[LoraLinear]) -> None:
        self.linears = linears
        self.a: torch.Tensor | None = None  # of all linears, stacked
        self.own: list[list[torch.Tensor | None]] = [[None, None, None] for _ in linears]  # b, weight, bias

    def add(
        self, dy_NO: torch.Tensor, x_NE: torch.Tensor | None, d_xa: torch.Tensor | None, d_bs: Sequence[torch.Tensor]
    ) -> None:
        """Adds the gradients of one tile; arguments as in `stacked.parameter_gradients`."""
        if d_xa is not None and x_NE is not None:
            self.a = add_matmul(self.a, d_xa.T, x_NE)
        for index, (one, (_, columns)) in enumerate(zip(self.linears, blocks_of(self.linears), strict=True)):
            own, mine = self.own[index], dy_NO[:, columns]
            if one.b is not None:
                own[0] = _added(own[0], d_bs[index])
            if one.trained_weight is not None and x_NE is not None:
                own[1] = add_matmul(own[1], mine.T, x_NE)
            if one.trained_bias is not None:
                own[2] = _added(own[2], mine.sum(0, dtype=at_least_fp32(mine[:0]).dtype))

    def rounded(self) -> list[torch.Tensor | None]:
        """Returns the gradients of `parameters(linears)`, each in its parameter's dtype."""
        found = []
        for one, (rows, _), (b, weight, bias) in zip(self.linears, blocks_of(self.linears), self.own, strict=True):
            a = self.a[rows] if self.a is not None and one.a is not None else None
            sums = (a, None if b is None else b.mul_(one.scale), weight, bias)
            found += [
                None if t is None or p is None else t.to(p.dtype) for t, p in zip(sums, parameters((one,)), strict=True)
            ]
        return found


def _added(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return at_least_fp32(part).clone() if total is None else total.add_(part)


@dataclass
class TiledCall:
    """One call of the op. down_xa: one tensor per tile, held from the forward to the first backward."""

    linears: tuple[LoraLinear, ...]
    activation: str
    tile: int
    down_xa: list[torch.Tensor | None] = field(default_factory=list)

    def dense(self, dtype: torch.dtype) -> tuple[LoraLinear, ...]:
        """Returns gate, up and down over dense weights (`dense_once`)."""
        return (*dense_once(self.linears[:2], dtype), *dense_once(self.linears[2:], dtype))


class TiledBackwardFunction(torch.autograd.Function):
    """Returns a grad_anchor, whose gradient is the output's; computes every gradient but the residual's. Saves the
    input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm_input: Any, call: TiledCall, *_: Any) -> torch.Tensor:
        flat = flat_rows(x)
        ctx.save_for_backward(*SavedInput.tensors(flat, norm_input, needed=True))
        ctx.call, ctx.versions, ctx.shape = call, versions(call.linears), x.shape
        ctx.norm_config = SavedInput.config(norm_input)
        return grad_anchor_of(flat, call.linears)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved_x, norm_weight = ctx.saved_tensors
        dy, saved_x = flat_rows(grad), flat_rows(saved_x)
        call: TiledCall = ctx.call
        check_versions(call.linears, ctx.versions)
        both, down, dense = call.linears[:2], call.linears[2:], call.dense(dy.dtype)
        of_both, of_down = GradientSums(both), GradientSums(down)
        dx = dy.new_empty(len(dy), ctx.shape[-1]) if ctx.needs_input_grad[0] else None
        down_xa, call.down_xa = call.down_xa, []  # else it lives as long as the caller holds the loss

        # A function, so that the buffers of a tile are freed before those of the next one are allocated.
        def one_tile(index: int, rows: slice) -> None:
            flat = SavedInput.restore(saved_x[rows], norm_weight, ctx.norm_config, dy.dtype)
            assert flat is not None
            acts = (
                recompute_gate_up(flat, dense, down_xa[index])
                if down_xa
                else gate_up_forward(flat, dense, call.activation)[1]
            )
            of_down.add(dy[rows], *gate_up_backward(dy[rows], acts, dense[2:], call.activation, needs_input(down)))
            d_gate_up = acts.gate_up
            d_xa, d_b = lora_gradients(both, d_gate_up, acts.xa, acts.b)
            if dx is not None:
                input_gradient(d_gate_up, dense[:2], d_xa, acts.a, dx[rows])
            of_both.add(d_gate_up, flat, d_xa, d_b)

        for index, rows in enumerate(tiles(len(dy), call.tile)):
            one_tile(index, rows)
        return None if dx is None else dx.view(ctx.shape), None, None, *of_both.rounded(), *of_down.rounded()


class TiledForwardFunction(torch.autograd.Function):
    """Returns the output (N, E). x is detached: `TiledBackwardFunction`, which `grad_anchor` leads to, computes every
    gradient but the residual's."""

    @staticmethod
    def forward(
        ctx: Any, grad_anchor: torch.Tensor, x_NE: torch.Tensor, residual: Any, call: TiledCall
    ) -> torch.Tensor:
        ctx.shape = None if residual is None else residual.shape
        base = None if residual is None else flat_rows(residual)
        dense, out = call.dense(x_NE.dtype), x_NE.new_empty(grad_anchor.shape)

        def one_tile(rows: slice) -> torch.Tensor | None:
            h, acts = gate_up_forward(x_NE[rows], dense, call.activation)
            down_xa, down_b = acts.down_xa, acts.down_b
            del acts  # frees gate and up
            project(h, dense[2:], down_xa, down_b, None if base is None else base[rows], out[rows])
            return down_xa

        call.down_xa = [one_tile(rows) for rows in tiles(len(x_NE), call.tile)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return dy, None, None if ctx.shape is None else dy.view(ctx.shape), None


def lora_mlp(
    x: torch.Tensor,
    linears: Sequence[LoraLinear],
    activation: str,
    residual: torch.Tensor | None,
    norm_input: NormInput | None,
    tile: int,
) -> torch.Tensor:
    call = TiledCall(tuple(linears), activation, tile)
    grad_anchor = run(TiledBackwardFunction, x, norm_input, call, *parameters(call.linears))
    out: torch.Tensor = run(TiledForwardFunction, grad_anchor, flat_rows(x.detach()), residual, call)
    return out.view(*x.shape[:-1], out.shape[-1])
