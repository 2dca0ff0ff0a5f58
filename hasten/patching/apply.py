"""Carries out a plan: retypes instances, patches no class. Undone by one assignment per module."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from hasten.errors import ContractError, PatchError
from hasten.families.schema import Family
from hasten.ops.backend import backend_for
from hasten.overlays import HeadOverlay, Overlay
from hasten.patching.contract import stock_class
from hasten.patching.plan import Plan, plan
from hasten.state import causal_lm_of, find_state, state_of
from hasten.weights import pack_weights


@functools.cache
def overlay_class(stock: type, overlay: type[Overlay], overlay_config: Any, methods: type | None = None) -> type:
    """The subclass that carries `overlay_config`. It keeps the stock class's name and module, which transformers writes to disk."""
    bases = (methods, overlay, stock) if methods is not None else (overlay, stock)
    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "overlay_config": overlay_config,
        "stock_class": stock,
    }
    return type(stock.__name__, bases, names)


def apply(model: nn.Module, planned: Plan | None = None, methods: type | None = None) -> Plan:
    """Puts the planned overlays on (None = `plan(model)`) and returns the plan.

    methods: a mixin with user-facing methods for the causal LM. Raises ContractError or PatchError before anything is
    changed. A module that already wears an overlay gets the planned one in its place.
    """
    planned = plan(model) if planned is None else planned
    if planned.problems:
        kind = ContractError if planned.family is not None and _is_drift(planned) else PatchError
        raise kind("overlays were not put on, nothing was changed:\n  " + "\n  ".join(planned.problems))
    base = causal_lm_of(model)
    for action in planned.actions:
        module = base.get_submodule(action.name)
        extra = methods if action.overlay is HeadOverlay else None
        _retype(module, overlay_class(stock_class(module), action.overlay, action.overlay_config, extra))
        _lay_out(module, action.overlay.packed_projections)
    state_of(base).plan = planned
    return planned


def _lay_out(module: nn.Module, names: tuple[str, ...]) -> None:
    """Weights that one product reads, behind each other, where the ops that profit run. Values and parameters stay."""
    readers = [module.get_submodule(name) for name in names]
    if readers and all(backend_for(weight) == "triton" for reader in readers for weight in reader.parameters()):
        pack_weights(readers)


def restore(model: nn.Module) -> nn.Module:
    """Gives every module its stock class back, and returns `model`. Weights, hooks and adapters stay as they are."""
    base = causal_lm_of(model)
    for module in model.modules():
        if isinstance(module, Overlay):
            _retype(module, stock_class(module))
    state = find_state(base)
    if state is None:
        return model
    state.plan = None
    request, state.fused_head = state.fused_head, None
    if request is not None:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(base, request.temperature, request.cast_lm_head_to_fp32, request.outputs)
    return model


@contextmanager
def patched(model: nn.Module, family: Family | None = None) -> Iterator[nn.Module]:
    """Overlays on inside the block, the former state after it. A model that is already patched stays so."""
    if is_patched(model):
        yield model
        return
    apply(model, plan(model, family))
    try:
        yield model
    finally:
        restore(model)


def is_patched(model: nn.Module) -> bool:
    """Whether any module of `model` wears an overlay."""
    return any(isinstance(module, Overlay) for module in causal_lm_of(model).modules())


def reconfigure(module: Overlay, **changes: Any) -> None:
    """Changes fields of an overlay's config on this instance."""
    kind = type(module)
    config = replace(module.overlay_config, **changes)
    overlay = next(base for base in kind.__mro__ if issubclass(base, Overlay) and "stock_class" not in base.__dict__)
    _retype(module, overlay_class(kind.stock_class, overlay, config))


def _retype(module: nn.Module, target: type) -> None:
    hooked = hasattr(module, "_hf_hook") and "_old_forward" in module.__dict__
    module.__class__ = target
    if hooked:  # accelerate calls the forward that it found; it must find the new class's
        module.__dict__["_old_forward"] = target.forward.__get__(module)


def _is_drift(planned: Plan) -> bool:
    return not any("forward was replaced" in problem for problem in planned.problems)
