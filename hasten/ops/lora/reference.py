"""LoRA linears and the gated MLP in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hasten.ops.glu.reference import glu
from hasten.ops.rope.reference import qk_rope
from hasten.ops.rows import in_tiles

if TYPE_CHECKING:
    from hasten.ops.lora import HeadsConfig, LoraLinear


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


def _linear(x: torch.Tensor, linear: LoraLinear) -> torch.Tensor:
    y = torch.nn.functional.linear(x, linear.weight.dense(x.dtype), linear.bias)
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
