"""Reads a PEFT layer: the base layer under it, what adapts it, and the plain LoRA pair, if that is all there is."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class LoraPair:
    """One active, plain LoRA: y += scale * (x @ a.T) @ b.T. a (R, in), b (out, R)."""

    a_RE: torch.Tensor
    b_VR: torch.Tensor
    scale: float


def unwrap(module: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """(the stock layer that PEFT wrapped, the adapter layers around it, innermost first).

    Where `modules_to_save` made a trained copy that acts, the copy is the stock layer; a copy that does not act
    (another adapter's, or adapters disabled) is passed over. Adapter layers are named whether or not they act.
    """
    layers: list[nn.Module] = []
    while True:
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            module = _acting_copy(module) or module.original_module  # pyright: ignore[reportAssignmentType]
        elif "token_adapter" in module._modules:  # PEFT's trainable_token_indices
            layers.append(module.token_adapter)  # pyright: ignore[reportArgumentType]
            module = module.token_adapter.base_layer  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
        elif "base_layer" in module._modules:
            layers.append(module)
            module = module.base_layer  # pyright: ignore[reportAssignmentType]
        else:
            return module, layers[::-1]


def base_layer_of(module: nn.Module) -> nn.Module:
    """The layer that PEFT wrapped, through any number of wrappers; a trained copy where `modules_to_save` made one."""
    return unwrap(module)[0]


def active_adapters(layer: nn.Module) -> list[str]:
    """The names of the adapters that act in an adapter layer, in PEFT's order; none while adapters are disabled."""
    if getattr(layer, "disable_adapters", False):
        return []
    names = getattr(layer, "active_adapters", [])
    return [names] if isinstance(names, str) else list(names)


def read_lora(module: nn.Module, training: bool) -> tuple[LoraPair | None, str | None]:
    """(pair, None) for a plain LoRA, (None, None) where no adapter acts, (None, reason) for what must go through PEFT.

    `training`: whether dropout acts. Reasons name what stands in the way of the fused path: several adapters, DoRA or
    another variant, dropout, a bias on B, single trained token rows, another kind of adapter.
    """
    _, layers = unwrap(module)
    acting = [layer for layer in layers if active_adapters(layer)]
    for layer in acting:
        if not hasattr(layer, "lora_A"):
            tokens = hasattr(layer, "trainable_tokens_delta")
            return None, "single trained token rows" if tokens else f"adapter of type {type(layer).__name__}"
    if len(acting) > 1:
        return None, f"{len(acting)} adapter layers on top of each other"
    return _read_layer(acting[0], training) if acting else (None, None)


def read_linear(module: nn.Module, training: bool) -> tuple[nn.Module | None, LoraPair | None, str | None]:
    """(base Linear, LoRA or None, None) where both together are all that `module` computes, else (None, None, reason)."""
    pair, reason = read_lora(module, training)
    base = base_layer_of(module)
    if reason is None and type(base) is not nn.Linear:
        reason = f"held as {type(base).__name__}"
    return (None, None, reason) if reason is not None else (base, pair, None)


def _acting_copy(wrapper: nn.Module) -> nn.Module | None:
    """The trained copy that a `modules_to_save` wrapper runs, by the wrapper's own rule: all active names must be its own."""
    names = active_adapters(wrapper)
    copies: nn.ModuleDict = wrapper.modules_to_save  # pyright: ignore[reportAssignmentType]
    return copies[names[0]] if names and all(name in copies for name in names) else None


def _read_layer(layer: nn.Module, training: bool) -> tuple[LoraPair | None, str | None]:
    if getattr(layer, "merged", False):
        return None, None
    if "lora_embedding_A" in layer._modules and any(n in layer.lora_embedding_A for n in active_adapters(layer)):  # pyright: ignore[reportOperatorIssue]
        return None, "LoRA on an embedding"
    active = [name for name in active_adapters(layer) if name in layer.lora_A]  # pyright: ignore[reportOperatorIssue]
    if not active:
        return None, None
    if len(active) > 1:
        return None, f"{len(active)} adapters act at once"
    name = active[0]
    if name in getattr(layer, "lora_variant", {}):
        return None, f"adapter variant {type(layer.lora_variant[name]).__name__}"  # pyright: ignore[reportIndexIssue]
    if training and not isinstance(layer.lora_dropout[name], nn.Identity):  # pyright: ignore[reportIndexIssue]
        return None, "lora_dropout > 0"
    a, b = layer.lora_A[name], layer.lora_B[name]  # pyright: ignore[reportIndexIssue]
    if b.bias is not None:
        return None, "bias on lora_B"
    return LoraPair(a.weight, b.weight, float(layer.scaling[name])), None  # pyright: ignore[reportIndexIssue]
