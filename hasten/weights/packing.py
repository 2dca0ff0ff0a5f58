"""Packs the weights of projections that read one input into one tensor, so that one matmul reads them all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hasten.ops.lora.stacked import stacked_view
from hasten.weights.peft_layers import base_layer_of


def pack_weights(modules: Sequence[Any]) -> bool:
    """Moves the weights of plain Linears into one tensor, one after the other along the output channels.

    Values, Parameter objects and names do not change. Returns False, and moves nothing, where the weights cannot be in
    one tensor: they are quantised, or differ in dtype, device or input size.
    """
    bases = [base_layer_of(module) for module in modules]
    if any(type(base) is not nn.Linear or type(base.weight) is not nn.Parameter for base in bases):
        return False
    weights: list[torch.Tensor] = [base.weight for base in bases]  # pyright: ignore[reportAssignmentType]
    first = weights[0]
    if any((w.dtype, w.device, w.shape[1]) != (first.dtype, first.device, first.shape[1]) for w in weights):
        return False
    packed = torch.cat([w.data for w in weights])
    for weight, part in zip(weights, packed.split([w.shape[0] for w in weights]), strict=True):
        weight.data = part
    return True


def is_packed(modules: Sequence[Any]) -> bool:
    """Returns whether one matmul over these Linears copies no dense weight: they are packed into one tensor, or none is
    dense."""
    held = [base.weight if type(base) is nn.Linear else None for base in map(base_layer_of, modules)]
    return all(weight is None for weight in held) or stacked_view(held) is not None  # pyright: ignore[reportArgumentType]
