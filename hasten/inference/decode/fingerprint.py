"""What a captured step has baked in, so that it is captured anew where any of it has changed."""

from typing import Any

import torch
from torch import nn

ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""Attributes of PEFT's modules that decide what their forward computes."""


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything that a captured step has baked in: addresses and layouts of the weights, the classes that run, the adapters
    that are active and their scales, autocast."""
    found: list[Any] = []
    for module in modules_of(model):
        found.append(type(module))
        own = vars(module)
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is not None:
                found += (tensor.data_ptr(), tensor.dtype, tensor.shape)
        for name in ADAPTERS:
            value = own.get(name)
            found.append(
                tuple(value.items()) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
            )
    kind = model.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    forward = vars(model).get("forward")
    return id(model), getattr(forward, "__func__", id(forward)), autocast, *found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Returns `model.modules()` in any order, several times as fast: thousands of modules are walked before each call."""
    seen, found, left = {id(model)}, [], [model]
    while left:
        module = left.pop()
        found.append(module)
        for child in vars(module)["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                left.append(child)
    return found
