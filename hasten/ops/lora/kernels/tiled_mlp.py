"""The gated MLP some rows at a time: nothing as wide as the MLP outlives its tile, in either direction.

Two Functions, as in `mlp.kernel`, but the first one computes nothing: it keeps the input and has the whole backward, which makes
gate and up again tile by tile. The second one runs the forward, keeps nothing, and comes last. So a layer that is
recomputed does not run the MLP's forward again before the backward does. Weights are acts dense once for all tiles.
What the second one leaves to the first, past autograd, is product @ A.T of down's LoRA: R numbers a row, which spare the
backward an activation and a product as wide as the MLP. Autograd cannot free them, so the backward does; a second one over
the same graph makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.lora import DenseWeight, LoraLinear
from hasten.ops.lora.kernels.linear import SavedInput, input_gradient, needs_input, project, thin_gradients
from hasten.ops.lora.kernels.mlp import gate_up_backward, gate_up_forward, grad_anchor_of, recompute_gate_up
from hasten.ops.lora.stacked import blocks_of, check_versions, parameters, versions, weight_of, widths
from hasten.ops.precision import add_product, at_least_fp32
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.norm import NormInput


def tiles(rows: int, tile: int) -> Iterator[slice]:
    """Slices of at most `tile` rows; one empty slice where there are no rows, whose gradients are then zeros."""
    return (slice(start, min(start + tile, rows)) for start in range(0, max(rows, 1), tile))


def dense_once(linears: Sequence[LoraLinear], dtype: torch.dtype) -> tuple[LoraLinear, ...]:
    """The linears over weights that are dense in `dtype` and lie behind each other, so that no tile has to gate_up_forward them so."""
    rows = weight_of(linears, dtype).detach().split(widths(linears))
    return tuple(replace(one, weight=DenseWeight(part)) for one, part in zip(linears, rows, strict=True))


class GradientSums:
    """The gradients of `parameters(linears)` summed over tiles of rows in at least fp32, and rounded once."""

    def __init__(self, linears: Sequence[LoraLinear]) -> None:
        self.linears = linears
        self.a: torch.Tensor | None = None
        self.own: list[list[torch.Tensor | None]] = [[None, None, None] for _ in linears]  # b, weight, bias

    def add(
        self, dy_NO: torch.Tensor, x_NE: torch.Tensor | None, d_xa: torch.Tensor | None, d_bs: Sequence[torch.Tensor]
    ) -> None:
        """One tile's share; arguments as in `stacked.parameter_gradients`."""
        if d_xa is not None and x_NE is not None:
            self.a = add_product(self.a, d_xa.T, x_NE)
        for index, (one, (_, columns)) in enumerate(zip(self.linears, blocks_of(self.linears), strict=True)):
            own, mine = self.own[index], dy_NO[:, columns]
            if one.b is not None:
                own[0] = _added(own[0], d_bs[index])
            if one.trained_weight is not None and x_NE is not None:
                own[1] = add_product(own[1], mine.T, x_NE)
            if one.trained_bias is not None:
                own[2] = _added(own[2], mine.sum(0, dtype=at_least_fp32(mine[:0]).dtype))

    def rounded(self) -> list[torch.Tensor | None]:
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
class Run:
    """One run of the op. pas: product @ A.T of down's LoRA, tile by tile, from the forward to the first backward."""

    linears: tuple[LoraLinear, ...]
    activation: str
    tile: int
    pas: list[torch.Tensor | None] = field(default_factory=list)

    def dense(self, dtype: torch.dtype) -> tuple[LoraLinear, ...]:
        """The linears over dense weights."""
        return (*dense_once(self.linears[:2], dtype), *dense_once(self.linears[2:], dtype))


class TiledBackwardFunction(torch.autograd.Function):
    """A grad_anchor that leads the output's gradient here, where every gradient but the residual's is acts."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm_input: Any, run: Run, *_: Any) -> torch.Tensor:
        flat = flat_rows(x)
        ctx.save_for_backward(*SavedInput.tensors(flat, norm_input, needed=True))
        ctx.run, ctx.versions, ctx.rule, ctx.shape = run, versions(run.linears), SavedInput.rule(norm_input), x.shape
        return grad_anchor_of(flat, run.linears)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        source, norm_weight = ctx.saved_tensors
        dy, source = flat_rows(grad), flat_rows(source)
        run: Run = ctx.run
        check_versions(run.linears, ctx.versions)
        both, down, dense = run.linears[:2], run.linears[2:], run.dense(dy.dtype)
        of_both, of_down = GradientSums(both), GradientSums(down)
        dx = dy.new_empty(len(dy), ctx.shape[-1]) if ctx.needs_input_grad[0] else None
        pas, run.pas = run.pas, []  # whoever keeps the loss keeps `run`

        # A function, so that a tile's buffers are gone before the next one's are acts.
        def one_tile(index: int, rows: slice) -> None:
            flat = SavedInput.rows(source[rows], norm_weight, ctx.rule, dy.dtype)
            assert flat is not None
            acts = (
                recompute_gate_up(flat, dense, pas[index]) if pas else gate_up_forward(flat, dense, run.activation)[1]
            )
            of_down.add(dy[rows], *gate_up_backward(dy[rows], acts, dense[2:], run.activation, needs_input(down)))
            d_gu = acts.gu
            d_xa, d_b = thin_gradients(both, d_gu, acts.xa, acts.b)
            if dx is not None:
                input_gradient(d_gu, dense[:2], d_xa, acts.a, dx[rows])
            of_both.add(d_gu, flat, d_xa, d_b)

        for index, rows in enumerate(tiles(len(dy), run.tile)):
            one_tile(index, rows)
        return None if dx is None else dx.view(ctx.shape), None, None, *of_both.rounded(), *of_down.rounded()


class TiledForwardFunction(torch.autograd.Function):
    """The output's rows. x_NE comes without gradient: all gradients but the residual's are acts behind `grad_anchor`."""

    @staticmethod
    def forward(ctx: Any, grad_anchor: torch.Tensor, x_NE: torch.Tensor, residual: Any, run: Run) -> torch.Tensor:
        ctx.shape = None if residual is None else residual.shape
        base = None if residual is None else flat_rows(residual)
        dense, out = run.dense(x_NE.dtype), x_NE.new_empty(grad_anchor.shape)

        def one_tile(rows: slice) -> torch.Tensor | None:
            product, acts = gate_up_forward(x_NE[rows], dense, run.activation)
            pa, b = acts.pa, acts.b_down
            del acts  # gate and up
            project(product, dense[2:], pa, b, None if base is None else base[rows], out[rows])
            return pa

        run.pas = [one_tile(rows) for rows in tiles(len(x_NE), run.tile)]
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
    run = Run(tuple(linears), activation, tile)
    grad_anchor = TiledBackwardFunction.apply(x, norm_input, run, *parameters(run.linears))
    out: torch.Tensor = TiledForwardFunction.apply(grad_anchor, flat_rows(x.detach()), residual, run)  # pyright: ignore[reportAssignmentType]
    return out.view(*x.shape[:-1], out.shape[-1])
