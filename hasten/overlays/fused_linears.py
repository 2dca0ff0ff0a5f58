"""Chooses between a module's own forward and the fused LoRA ops, anew at each call: adapters come and go.

The ops run on a GPU, where every projection that reads the input is a frozen weight with at most one plain LoRA. What
stands in the way of one projection is named by `weights.frozen_linear`, and the report shows it.
"""

from typing import Any

import torch

from hasten.ops.backend import backend_for
from hasten.ops.lora import LoraLinear, lora_linears
from hasten.overlays.rows import compute_dtype
from hasten.weights import frozen_linear


def fused_input(
    x: torch.Tensor, modules: tuple[Any, ...], training: bool
) -> tuple[torch.Tensor, tuple[LoraLinear, ...]] | None:
    """(x in the dtype to multiply in, the linears), or None where the modules' own forwards must run."""
    if backend_for(x) != "triton":
        return None
    found = []
    for module in modules:
        linear, reason = frozen_linear(module, training)
        if linear is None or reason is not None:
            return None
        found.append(linear)
    return x.to(compute_dtype(x)), tuple(found)


def linears(
    x: torch.Tensor, modules: tuple[Any, ...], training: bool, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Each module's output for x (..., in), on top of `residual` where given: by one fused op, or by their own forwards."""
    fused = fused_input(x, modules, training)
    if fused is None:
        outs = tuple(module(x) for module in modules)
        return outs if residual is None else tuple(residual + out for out in outs)
    return lora_linears(*fused, residual)
