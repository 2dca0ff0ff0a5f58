"""Finds the PeftModel around a causal LM, and everything active in it that a merge cannot write into a weight."""

import gc
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hasten.errors import ExportError
from hasten.weights import active_adapters, adapter_type

MERGEABLE = ("LORA", "ADALORA", "TRAINABLE_TOKENS", "MIXED")
"""PEFT's methods that a merge reads. MIXED only holds layers of other methods, each of which is looked at itself."""
SHOWN = 3
"""Modules that a message names; the rest is counted."""


def peft_model_of(model: nn.Module) -> Any:
    """Returns the PeftModel to write the adapter of: the outermost one around `model`, or `model` itself.

    A PeftModel passes methods that it lacks on to the model inside, so `save_pretrained_merged` may run on the causal
    LM. Raises ExportError where several PeftModels are around it, side by side.
    """
    around = peft_models_around(model)
    outermost = [one for one in around if not any(_contains(other, one) for other in around)]
    if len(outermost) > 1:
        kinds = ", ".join(type(one).__name__ for one in outermost)
        raise ExportError(f"{len(outermost)} PEFT models are around this model ({kinds}); delete all but one of them")
    return outermost[0] if outermost else model


def peft_models_around(model: nn.Module) -> list[Any]:
    """Returns every PeftModel that contains `model`, at any depth.

    Prompt methods leave no trace in the causal LM, since their weights are the PeftModel's own; so the process's live
    objects are searched.
    """
    gc.collect()  # otherwise a deleted PeftModel counts until its cycles are collected
    kinds = (PeftModel, PeftMixedModel)
    # type(), since isinstance() asks foreign proxies for their class, which can run code.
    return [one for one in gc.get_objects() if issubclass(type(one), kinds) and _contains(one, model)]


def _contains(outer: nn.Module, model: nn.Module) -> bool:
    return outer is not model and any(module is model for module in outer.modules())


def unmergeable(models: Iterable[nn.Module]) -> list[str]:
    """Returns a problem for each active method of PEFT's that a merge cannot read; empty = none.

    Walks every module: a class of PEFT's that a merge does not know is a problem, whatever it is called.
    """
    places: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    seen: set[int] = set()
    for name, module in (pair for model in models for pair in model.named_modules()):
        method = None if id(module) in seen else _prompt_method(module) or _foreign_method(module)
        seen.add(id(module))
        if isinstance(module, PeftModel) and module._is_prompt_learning:  # one problem for all of it, none if disabled
            seen.update(id(one) for one in module.prompt_encoder.modules())
        if method is not None:
            places.setdefault(method, []).append(name or type(module).__name__)
            reasons.setdefault(method, _reason(module, method))
    more = {method: len(names) - 1 for method, names in places.items()}
    return [
        f"{names[0]}: {reasons[method]}" + (f" ({more[method]} more modules)" if more[method] else "")
        for method, names in places.items()
    ]


def _foreign_method(module: nn.Module) -> str | None:
    """Returns the method that an active module of PEFT's belongs to, None for those that a merge reads."""
    method = adapter_type(module)
    return None if method in (None, *MERGEABLE) or not _is_active(module) else method


def _prompt_method(module: Any) -> str | None:
    """Returns the method of a PeftModel whose prompt is active (prompt, prefix, p-tuning, ...), else None."""
    own = module.__dict__
    if not own.get("_is_prompt_learning") or own.get("_adapters_disabled"):
        return None
    kind = module.peft_config[module.active_adapter].peft_type
    return str(getattr(kind, "value", kind))


def _reason(module: nn.Module, method: str) -> str:
    instead = 'save the adapter with save_method="lora"'
    if _prompt_method(module) is not None:
        return f"{method} adds its prompt to the input and to no weight, so it cannot be merged; {instead}"
    name = type(module).__name__
    if hasattr(module, "merge") or hasattr(module, "merge_and_unload"):
        instead = f"use PEFT's merge_and_unload() where it can merge {method}, or {instead}"
    return f"{name} is not a LoRA layer but part of {method}, which cannot be merged here; {instead}"


def _is_active(module: Any) -> bool:
    """Returns whether a module of PEFT's takes part in the forward: its adapter layers know, others always do. A tuner
    (LoHaModel, ...) only holds the model; it is still there after merge_and_unload(), without layers."""
    if isinstance(module, BaseTuner):
        return False
    if isinstance(module, BaseTunerLayer):
        layer: Any = module
        held, names = layer._all_available_adapter_names(), active_adapters(layer)
        return any(name in held for name in names) if held else bool(names)
    return not isinstance(module, nn.ModuleDict | nn.ParameterDict)


def unread(models: Iterable[nn.Module], read: Iterable[torch.Tensor]) -> list[str]:
    """Returns the names of trainable parameters of `models` that are not among `read`, the tensors that a merge reads."""
    ids = {id(one) for one in read}
    named = (pair for model in models for pair in model.named_parameters())
    return list(dict.fromkeys(name for name, one in named if one.requires_grad and id(one) not in ids))


def listed(names: list[str]) -> str:
    """Joins names for a message; beyond `SHOWN` of them only their number."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
