"""Reads PEFT's wrappers: the stock layer inside, the adapters that act, and the plain LoRA where that is all there is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten.weights.watched import is_watched


@dataclass(frozen=True)
class LoraPair:
    """One active, plain LoRA (Hu et al. 2021, arXiv:2106.09685): y += scale * (x @ a.T) @ b.T. a (R, in), b (out, R)."""

    a_RE: torch.Tensor
    b_VR: torch.Tensor
    scale: float


def unwrap(module: Any) -> tuple[nn.Module, list[Any]]:
    """Returns (the stock layer that PEFT wrapped, the adapter layers around it, innermost first).

    Where `modules_to_save` made a trained copy and the copy is active, the copy is the stock layer; an inactive copy
    (another adapter's, or adapters disabled) is ignored. Adapter layers are returned whether or not they are active.
    """
    layers: list[Any] = []
    while True:
        # Not hasattr: asking a Module for an attribute that it lacks is slow, and this runs at every call.
        children = module._modules
        if "modules_to_save" in children and "original_module" in children:
            acting = _acting_copy(module)
            module = module.original_module if acting is None else acting
        elif "token_adapter" in children:  # PEFT's trainable_token_indices
            layers.append(module.token_adapter)
            module = module.token_adapter.base_layer
        elif "base_layer" in children:
            layers.append(module)
            module = module.base_layer
        else:
            return module, layers[::-1]


def base_layer_of(module: Any) -> nn.Module:
    """Returns the layer that PEFT wrapped, through any number of wrappers; a trained copy where `modules_to_save` made
    one."""
    return unwrap(module)[0]


def active_adapters(layer: nn.Module) -> list[str]:
    """Returns the names of the active adapters of an adapter layer, in PEFT's order; none while adapters are
    disabled."""
    if getattr(layer, "disable_adapters", False):
        return []
    names = getattr(layer, "active_adapters", [])
    return [names] if isinstance(names, str) else list(names)


def read_lora(module: Any, training: bool) -> tuple[LoraPair | None, str | None]:
    """Returns (pair, None) for a plain LoRA, (None, None) where no adapter is active, (None, reason) for what must go
    through PEFT.

    training: dropout acts. Reasons: several adapters, DoRA or another variant, dropout, a bias on B, hooks on A or B,
    single trained token rows, another kind of adapter.
    """
    return read_adapters(unwrap(module)[1], training)


def read_adapters(layers: list[Any], training: bool) -> tuple[LoraPair | None, str | None]:
    """`read_lora` of the adapter layers that `unwrap` returned."""
    merged = [layer for layer in layers if getattr(layer, "merged", False)]
    if any(getattr(layer, "disable_adapters", False) for layer in merged):
        return None, "adapters disabled while merged"  # PEFT takes them out of the weight on the next forward
    acting = [layer for layer in layers if layer not in merged and active_adapters(layer)]
    for layer in acting:
        if "lora_A" not in layer._modules:
            tokens = hasattr(layer, "trainable_tokens_delta")
            return None, "single trained token rows" if tokens else f"adapter of type {type(layer).__name__}"
    if len(acting) > 1:
        return None, f"{len(acting)} adapter layers on top of each other"
    return _read_layer(acting[0], training) if acting else (None, None)


def _acting_copy(wrapper: Any) -> nn.Module | None:
    """Returns the trained copy that a `modules_to_save` wrapper runs, by the wrapper's own rule: all active names must
    be its own."""
    names = active_adapters(wrapper)
    copies = wrapper.modules_to_save
    return copies[names[0]] if names and all(name in copies for name in names) else None


def _read_layer(layer: Any, training: bool) -> tuple[LoraPair | None, str | None]:
    if "lora_embedding_A" in layer._modules and any(n in layer.lora_embedding_A for n in active_adapters(layer)):
        return None, "LoRA on an embedding"
    active = [name for name in active_adapters(layer) if name in layer.lora_A]
    if not active:
        return None, None
    if len(active) > 1:
        return None, f"{len(active)} adapters act at once"
    name = active[0]
    if name in getattr(layer, "lora_variant", {}):
        return None, f"adapter variant {type(layer.lora_variant[name]).__name__}"
    if training and not isinstance(layer.lora_dropout[name], nn.Identity):
        return None, "lora_dropout > 0"
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None:
        return None, "bias on lora_B"
    if is_watched(a) or is_watched(b):
        return None, "hooks on the LoRA"
    return LoraPair(a.weight, b.weight, float(layer.scaling[name])), None
