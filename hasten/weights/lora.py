"""Reads a PEFT layer: the base Linear under it, and the plain LoRA pair on top of it, if that is all there is."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class LoraPair:
    """One active, plain LoRA: y += scale * (x @ a.T) @ b.T. a (R, in), b (out, R)."""

    a_RE: torch.Tensor
    b_VR: torch.Tensor
    scale: float


def base_layer_of(module: nn.Module) -> nn.Module:
    """The layer that PEFT wrapped, through any number of wrappers; a trained copy where `modules_to_save` made one."""
    while True:
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            active = [name for name in _active(module) if name in module.modules_to_save]
            disabled = bool(getattr(module, "disable_adapters", False))
            module = module.modules_to_save[active[0]] if active and not disabled else module.original_module
        elif hasattr(module, "base_layer"):
            module = module.base_layer
        else:
            return module


def read_lora(module: nn.Module, training: bool) -> tuple[LoraPair | None, str | None]:
    """(pair, None) for a plain LoRA, (None, None) where no adapter acts, (None, reason) for what must go through PEFT.

    `training`: whether dropout acts. Reasons name what stands in the way of the fused path: several adapters, DoRA or
    another variant, dropout, a bias on B.
    """
    if not hasattr(module, "lora_A"):
        return None, None
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None, None
    active = [name for name in _active(module) if name in module.lora_A]
    if not active:
        return None, None
    if len(active) > 1:
        return None, f"{len(active)} adapters act at once"
    name = active[0]
    if name in getattr(module, "lora_variant", {}):
        return None, f"adapter variant {type(module.lora_variant[name]).__name__}"
    if training and not isinstance(module.lora_dropout[name], nn.Identity):
        return None, "lora_dropout > 0"
    if module.lora_B[name].bias is not None:
        return None, "bias on lora_B"
    return LoraPair(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])), None


def _active(module: nn.Module) -> list[str]:
    names = getattr(module, "active_adapters", [])
    return [names] if isinstance(names, str) else list(names)


def read_linear(module: nn.Module, training: bool) -> tuple[nn.Module | None, LoraPair | None, str | None]:
    """(base Linear, LoRA or None, None) where both together are all that `module` computes, else (None, None, reason)."""
    pair, reason = read_lora(module, training)
    base = base_layer_of(module)
    if reason is None and type(base) is not nn.Linear:
        reason = f"held as {type(base).__name__}"
    return (None, None, reason) if reason is not None else (base, pair, None)
