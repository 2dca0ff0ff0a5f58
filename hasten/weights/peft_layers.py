"""Reads PEFT's wrappers: the stock layer inside, the active adapters, and the LoRA if it is a single plain one."""

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten.weights.own_forward import needs_own_forward, runs_forward_of

TUNERS = "peft.tuners."
LINEAR_LORA = re.compile(r"Linear\w*|Embedding")
"""PEFT's LoRA classes that compute base(x) + scale * (x A^T) B^T. Its other classes keep something else in `lora_A`."""


@dataclass(frozen=True)
class LoraPair:
    """One active, plain LoRA (Hu et al. 2021, arXiv:2106.09685): y += scale * (x @ a.T) @ b.T. a (R, in), b (out,
    R)."""

    a_RE: torch.Tensor
    b_VR: torch.Tensor
    scale: float


def unwrap(module: Any) -> tuple[nn.Module, list[Any]]:
    """Returns (the stock layer that PEFT wrapped, the adapter layers around it, innermost first).

    Where `modules_to_save` made a trained copy and the copy is active, the copy is the stock layer; an inactive copy
    (another adapter's, or adapters disabled) is ignored. Adapter layers are returned whether or not they are active.
    """
    return descend(module)[:2]


def descend(module: Any) -> tuple[nn.Module, list[Any], list[Any]]:
    """Returns what `unwrap` returns, and every module around the stock layer whose forward a call of `module` runs."""
    layers: list[Any] = []
    around: list[Any] = []
    while True:
        # Not hasattr: asking a Module for an attribute that it lacks is slow, and this runs at every call.
        children = module._modules
        if "modules_to_save" in children and "original_module" in children:
            around.append(module)
            copy = _active_copy(module)
            module = module.original_module if copy is None else copy
        elif "token_adapter" in children:  # PEFT's trainable_token_indices
            around += (module, module.token_adapter)
            layers.append(module.token_adapter)
            module = module.token_adapter.base_layer
        elif "base_layer" in children:
            around.append(module)
            layers.append(module)
            module = module.base_layer
        else:
            return module, layers[::-1], around


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


def adapter_type(layer: nn.Module) -> str | None:
    """Returns PEFT's name of the method that an adapter layer belongs to ("LORA", "ADALORA", "IA3", ...), None for a
    module that is not PEFT's."""
    defined = _peft_class(type(layer))
    return None if defined is None else defined.__module__.removeprefix(TUNERS).split(".")[0].upper()


@functools.cache
def _peft_class(kind: type) -> type | None:
    """Returns the first class in the MRO from the package of one of PEFT's methods; other libraries derive classes from
    it at run time. What methods share (`peft.tuners.tuners_utils`) is not meant."""
    return next((one for one in kind.__mro__ if re.match(rf"{TUNERS}\w+\.", one.__module__)), None)


@functools.cache
def is_linear_lora(kind: type) -> bool:
    """Returns whether the class is one of `LINEAR_LORA`, with that class's own forward. Cached: read at every call."""
    defined = _peft_class(kind)
    return (
        defined is not None
        and defined.__module__.startswith(f"{TUNERS}lora.")
        and LINEAR_LORA.fullmatch(defined.__name__) is not None
        and kind.forward is defined.forward  # pyright: ignore[reportAttributeAccessIssue]
    )


def read_lora(module: Any, training: bool) -> tuple[LoraPair | None, str | None]:
    """Returns (pair, None) for a plain LoRA, (None, None) where no adapter is active, (None, reason) if PEFT's own
    forward must run.

    training: dropout is active. Reasons: several adapters, DoRA or another variant, dropout, a bias on B, hooks on A,
    B or the dropout, trained rows of single tokens (trainable_token_indices), another kind of adapter.
    """
    return read_adapters(unwrap(module)[1], training)


def read_adapters(layers: list[Any], training: bool) -> tuple[LoraPair | None, str | None]:
    """Does what `read_lora` does, for the adapter layers that `unwrap` returned."""
    merged = [layer for layer in layers if getattr(layer, "merged", False)]
    if any(getattr(layer, "disable_adapters", False) for layer in merged):
        return None, "adapters disabled while merged"  # PEFT unmerges them on the next forward
    active = [layer for layer in layers if layer not in merged and active_adapters(layer)]
    for layer in active:
        if not is_linear_lora(type(layer)):
            tokens = hasattr(layer, "trainable_tokens_delta")
            name = f"{adapter_type(layer)} ({type(layer).__name__})"
            return None, "trained rows of single tokens" if tokens else f"adapter of type {name}"
    if len(active) > 1:
        return None, f"{len(active)} nested adapter layers"
    return _read_layer(active[0], training) if active else (None, None)


def _active_copy(wrapper: Any) -> nn.Module | None:
    """Returns the trained copy that a `modules_to_save` wrapper runs. It runs one only if all active adapter names are
    its own."""
    names = active_adapters(wrapper)
    copies = wrapper.modules_to_save
    return copies[names[0]] if names and all(name in copies for name in names) else None


def _read_layer(layer: Any, training: bool) -> tuple[LoraPair | None, str | None]:
    children, names = layer._modules, active_adapters(layer)  # attributes that are modules are slow to get
    if "lora_embedding_A" in children and any(name in children["lora_embedding_A"] for name in names):
        return None, "LoRA on an embedding"
    if not runs_forward_of(type(layer), ("peft",)):
        return None, f"forward of {type(layer).__name__} was replaced"
    down = children["lora_A"]._modules
    active = [name for name in names if name in down]
    if not active:
        return None, None
    if len(active) > 1:
        return None, f"{len(active)} adapters are active at once"
    name = active[0]
    if name in getattr(layer, "lora_variant", {}):
        return None, f"adapter variant {type(layer.lora_variant[name]).__name__}"
    a, b, dropout = down[name], children["lora_B"]._modules[name], children["lora_dropout"]._modules[name]
    if type(dropout) is not nn.Identity and (training or dropout.training or type(dropout) is not nn.Dropout):
        return None, "lora_dropout > 0"
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return None, f"LoRA of {type(a).__name__} and {type(b).__name__}"
    if b.bias is not None:
        return None, "bias on lora_B"
    if needs_own_forward(a) or needs_own_forward(b) or needs_own_forward(dropout):
        return None, "hooks on the LoRA"
    return LoraPair(a.weight, b.weight, float(layer.scaling[name])), None
