"""A module's weight and LoRA as `ops.lora` takes them, or the reason why its own forward must run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten.ops.lora import DenseWeight, LoraLinear, Weight
from hasten.ops.lora.stacked import stacked_view
from hasten.ops.nf4 import NF4Weight, dequantize_nf4
from hasten.weights.lora import base_layer_of, read_lora


@dataclass(frozen=True)
class PackedWeight(Weight):
    """An NF4 weight, dequantised anew at each call."""

    weight: NF4Weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.packed.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_nf4(self.weight, dtype)

    def write(self, out: torch.Tensor) -> None:
        dequantize_nf4(self.weight, out.dtype, out)


def is_watched(module: Any) -> bool:
    """Whether somebody hooks into the module's own forward, which then has to run as it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def plain_linear(module: Any, training: bool) -> tuple[LoraLinear | None, str | None]:
    """(linear, None) where a weight, a bias and at most one plain LoRA are all that `module` computes, else (None, reason)."""
    pair, reason = read_lora(module, training)
    if reason is not None:
        return None, reason
    base: Any = base_layer_of(module)
    if is_watched(module) or is_watched(base):
        return None, "hooks on the module"
    weight, reason = _weight_of(base)
    if weight is None:
        return None, reason
    if pair is None:
        return LoraLinear(weight, base.bias), None
    return LoraLinear(weight, base.bias, pair.a_RE, pair.b_VR, pair.scale), None


def _weight_of(base: Any) -> tuple[DenseWeight | PackedWeight | None, str | None]:
    if type(base) is nn.Linear:
        if type(base.weight) is not nn.Parameter:  # a DTensor, say: sharded by somebody
            return None, f"held as {type(base.weight).__name__}"
        return DenseWeight(base.weight), None
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


def pack_weights(modules: Sequence[Any]) -> bool:
    """Moves the weights of plain Linears that read one input behind each other in one buffer, so that one product can read
    them all. Values, Parameter objects and names stay; False where they cannot share a buffer (storage, dtype, device)."""
    bases = [base_layer_of(module) for module in modules]
    if any(type(base) is not nn.Linear or type(base.weight) is not nn.Parameter for base in bases):
        return False
    weights: list[torch.Tensor] = [base.weight for base in bases]  # pyright: ignore[reportAssignmentType]
    first = weights[0]
    if any((w.dtype, w.device, w.shape[1]) != (first.dtype, first.device, first.shape[1]) for w in weights):
        return False
    whole = torch.cat([w.data for w in weights])
    for weight, rows in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
        weight.data = rows
    return True


def lie_apart(modules: Sequence[Any]) -> bool:
    """Whether one product over these Linears must first copy weights that are stored as they are into one buffer."""
    held = [base.weight if type(base) is nn.Linear else None for base in map(base_layer_of, modules)]
    return any(weight is not None for weight in held) and stacked_view(held) is None  # pyright: ignore[reportArgumentType]
