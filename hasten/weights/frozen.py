"""A module's frozen weight and LoRA as `ops.lora` takes them, or the reason why its own forward must run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten.ops.lora import LoraLinear
from hasten.ops.nf4 import NF4Weight, dequantize_nf4
from hasten.weights.lora import base_layer_of, read_lora


@dataclass(frozen=True)
class DenseWeight:
    """A frozen parameter as it is."""

    weight: torch.Tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)


@dataclass(frozen=True)
class PackedWeight:
    """An NF4 weight, dequantised anew at each call."""

    weight: NF4Weight

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_nf4(self.weight, dtype)


def is_watched(module: Any) -> bool:
    """Whether somebody hooks into the module's own forward, which then has to run as it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def frozen_linear(module: Any, training: bool) -> tuple[LoraLinear | None, str | None]:
    """(linear, None) where a frozen weight and at most one plain LoRA are all that `module` computes, else (None, reason)."""
    pair, reason = read_lora(module, training)
    if reason is not None:
        return None, reason
    base: Any = base_layer_of(module)
    if is_watched(module) or is_watched(base):
        return None, "hooks on the module"
    weight, reason = _frozen_weight(base)
    if weight is None:
        return None, reason
    if base.bias is not None and base.bias.requires_grad:
        return None, "its bias trains"
    if pair is None:
        return LoraLinear(weight, base.bias), None
    return LoraLinear(weight, base.bias, pair.a_RE, pair.b_VR, pair.scale), None


def _frozen_weight(base: Any) -> tuple[DenseWeight | PackedWeight | None, str | None]:
    if type(base) is nn.Linear:
        return (None, "its weight trains") if base.weight.requires_grad else (DenseWeight(base.weight), None)
    if type(base.weight).__name__ == "Params4bit":
        return _read_nf4(base.weight)
    return None, f"held as {type(base).__name__}"


def _read_nf4(weight: Any) -> tuple[PackedWeight | None, str | None]:
    state = weight.quant_state
    if state is None or state.quant_type != "nf4" or getattr(state, "packing_format_for_cpu", False):
        return None, "4-bit, but not NF4 in the plain layout"
    packed, shape = weight.data.view(torch.uint8), (int(state.shape[0]), int(state.shape[1]))
    if not state.nested:
        return PackedWeight(NF4Weight(packed, state.code, shape, state.absmax, block=state.blocksize)), None
    outer = state.state2
    nested = NF4Weight(
        packed,
        state.code,
        shape,
        state.absmax,
        outer.code,
        outer.absmax,
        state.offset,
        state.blocksize,
        outer.blocksize,
    )
    return PackedWeight(nested), None
