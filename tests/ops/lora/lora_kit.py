"""LoRA linears for the tests of the ops, and the formula that they must agree with."""

from typing import Any

import torch
from device_kit import DEVICE
from torch.nn import functional as F

from hasten.ops.lora import DenseWeight, LoraLinear

WIDTH, RANK = 24, 4


def linear(out: int, width: int, lora: bool, bias: bool, dtype: torch.dtype, rank: int = RANK) -> LoraLinear:
    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.3).to(DEVICE, dtype)

    pair = (
        {"a": draw(rank, width).requires_grad_(), "b": draw(out, rank).requires_grad_(), "scale": 0.5} if lora else {}
    )
    return LoraLinear(DenseWeight(draw(out, width)), draw(out) if bias else None, **pair)


def formula(x: torch.Tensor, one: LoraLinear) -> torch.Tensor:
    weight = one.weight.dense(x.dtype)
    if one.a is not None and one.b is not None:
        weight = weight + one.scale * one.b.to(x.dtype) @ one.a.to(x.dtype)
    return F.linear(x, weight, None if one.bias is None else one.bias.to(x.dtype))


def trained(out: int, width: int, bias: bool) -> LoraLinear:
    """A Linear whose weight and bias train, without LoRA."""
    weight = torch.nn.Parameter((torch.randn(out, width) * 0.3).to(DEVICE))
    return LoraLinear(DenseWeight(weight), torch.randn(out, device=DEVICE).requires_grad_() if bias else None)


def everything(linears: Any) -> list[torch.Tensor]:
    found = [t for one in linears for t in (one.a, one.b, one.trained_weight, one.trained_bias)]
    return [t for t in found if t is not None]
