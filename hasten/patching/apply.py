"""Carries out a plan: sets `module.__class__` on instances and patches no class. One assignment per module undoes
it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from hasten.errors import ContractError, PatchError
from hasten.families.schema import Family
from hasten.ops.backend import backend_for
from hasten.overlays import HeadOverlay, Overlay, StockHeadOverlay
from hasten.patching.classes import configured, methods_of, overlay_class, set_class, stock_class, with_base
from hasten.patching.plan import Plan, plan
from hasten.state import causal_lm_of, find_state, state_of
from hasten.weights import pack_weights

CAUSAL_LM = (HeadOverlay, StockHeadOverlay)
"""Overlays of the causal LM itself, which carry the user-facing methods."""


def apply(model: nn.Module, planned: Plan | None = None, methods: type | None = None) -> Plan:
    """Puts the planned overlays on (None = `plan(model)`) and returns the plan.

    methods: a mixin with user-facing methods for the causal LM; None keeps its present one. A module that already has
    an overlay gets the planned one instead. Classes that others put over a module (FSDP2, parametrize) stay over its
    overlay. Raises ContractError or PatchError before anything is changed.
    """
    planned = plan(model) if planned is None else planned
    if planned.problems:
        kind = ContractError if planned.family is not None and _is_drift(planned) else PatchError
        raise kind("overlays were not applied, nothing was changed:\n  " + "\n  ".join(planned.problems))
    base = causal_lm_of(model)
    modules = [base.get_submodule(action.name) for action in planned.actions]
    targets = []
    for module, action in zip(modules, planned.actions, strict=True):
        extra = (methods or methods_of(module)) if action.overlay in CAUSAL_LM else None
        ours = overlay_class(stock_class(module), action.overlay, action.overlay_config, extra)
        targets.append((module, with_base(module, ours)))
    _set_classes(targets)
    for module, action in zip(modules, planned.actions, strict=True):
        _pack(module, action.overlay.packed_projections)
    state_of(base).plan = planned
    return planned


def put_overlay(module: nn.Module, overlay: type[Overlay], overlay_config: Any) -> None:
    """Puts one overlay over one module, under the classes that others put over it."""
    _set_classes([(module, with_base(module, overlay_class(stock_class(module), overlay, overlay_config)))])


def _pack(module: nn.Module, names: tuple[str, ...]) -> None:
    """Packs the weights of projections that one matmul reads, on a GPU. Values and Parameter objects do not change."""
    readers = [module.get_submodule(name) for name in names]
    if readers and all(backend_for(weight) == "triton" for reader in readers for weight in reader.parameters()):
        pack_weights(readers)


def restore(model: nn.Module) -> nn.Module:
    """Removes all overlays and returns `model`. Weights, hooks, adapters and classes of other libraries stay.

    A class that somebody put over an overlay (FSDP2, parametrize) is rebuilt over the stock class. Raises PatchError,
    before anything is changed, if that is impossible; the message names the class.
    """
    base = causal_lm_of(model)
    patched_modules = [module for module in model.modules() if isinstance(module, Overlay)]
    _set_classes([(module, with_base(module, stock_class(module))) for module in patched_modules])
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
    """Applies overlays inside the block and removes them after it. A model that is already patched is not changed."""
    if is_patched(model):
        yield model
        return
    apply(model, plan(model, family))
    try:
        yield model
    finally:
        restore(model)


def is_patched(model: nn.Module) -> bool:
    """Returns whether any module of `model` has an overlay."""
    return any(isinstance(module, Overlay) for module in causal_lm_of(model).modules())


def reconfigure(module: Overlay, **changes: Any) -> None:
    """Changes fields of an overlay's config on this instance."""
    _set_classes([(module, configured(module, replace(module.overlay_config, **changes)))])


def _set_classes(targets: list[tuple[nn.Module, type]]) -> None:
    """Sets the class of every module or of none: raises PatchError if Python refuses one."""
    done: list[tuple[nn.Module, type]] = []
    for module, target in targets:
        before = type(module)
        try:
            set_class(module, target)
        except TypeError as error:
            for changed, former in done:
                set_class(changed, former)
            raise PatchError(f"the class of a {before.__name__} cannot be changed: {error}") from error
        done.append((module, before))


def _is_drift(planned: Plan) -> bool:
    return not any("forward was replaced" in problem for problem in planned.problems)
