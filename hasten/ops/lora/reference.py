"""LoRA linears and the gated MLP in plain torch: the oracle of the kernels and the path on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.glu.reference import glu
from hasten.ops.lora.stacked import matmul_fp32
from hasten.ops.rope.reference import qk_rope
from hasten.ops.rows import flat_rows, in_tiles

if TYPE_CHECKING:
    from hasten.ops.lora import HeadsConfig, LoraLinear, Weight


def lora_linears(
    x: torch.Tensor, linears: Sequence[LoraLinear], residual: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    outs = tuple(_linear(x, linear) for linear in linears)
    return outs if residual is None else tuple(residual + out for out in outs)


def lora_qkv(
    x: torch.Tensor, linears: Sequence[LoraLinear], heads: HeadsConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (_linear(x, one).unflatten(-1, (-1, heads.dim)) for one in linears)
    return *qk_rope(q, k, heads.position, heads.rotation, heads.fp32, heads.qk_norm), v


class WeightMatmulFunction(torch.autograd.Function):
    """Computes x @ W.T by the weight's own matmul; the gradient of x by its `matmul_t`. stored: W's tensor where it
    trains."""

    @staticmethod
    def forward(ctx: Any, x_NE: torch.Tensor, stored: torch.Tensor | None, weight: Weight) -> torch.Tensor:
        ctx.save_for_backward(x_NE if ctx.needs_input_grad[1] else None, stored)
        ctx.weight = weight
        return weight.matmul(x_NE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: torch.Tensor) -> Any:
        x_NE, stored = ctx.saved_tensors
        dx = ctx.weight.matmul_t(dy_NO) if ctx.needs_input_grad[0] else None
        return dx, None if x_NE is None else matmul_fp32(dy_NO.T, x_NE, stored.dtype), None


def _base_linear(x: torch.Tensor, linear: LoraLinear) -> torch.Tensor:
    """Computes x @ W.T + bias."""
    weight = linear.weight
    if not weight.overrides_matmul:
        return torch.nn.functional.linear(x, weight.dense(x.dtype), linear.bias)
    y: torch.Tensor = WeightMatmulFunction.apply(flat_rows(x), weight.stored, weight)  # pyright: ignore[reportAssignmentType]
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if linear.bias is None else y + linear.bias


def _linear(x: torch.Tensor, linear: LoraLinear) -> torch.Tensor:
    y = _base_linear(x, linear)
    if linear.a is None or linear.b is None:
        return y
    return y + linear.scale * ((x @ linear.a.to(x.dtype).T) @ linear.b.to(x.dtype).T)


def lora_mlp(
    x: torch.Tensor,
    linears: tuple[LoraLinear, LoraLinear, LoraLinear],
    activation: str,
    residual: torch.Tensor | None,
    tile: int | None,
) -> torch.Tensor:
    gate, up, down = linears

    def mlp(x: torch.Tensor) -> torch.Tensor:
        return _linear(glu(_linear(x, gate), _linear(x, up), activation), down)

    out = mlp(x) if tile is None else in_tiles(mlp, x, tile)
    return out if residual is None else residual + out
