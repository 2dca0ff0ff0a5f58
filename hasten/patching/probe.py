"""Finds which overlay does what a module of a model type without a data file does, or says why none does.

Two proofs are needed. By name: the stock forward mentions no attribute, operation or argument that the overlay does not
know (`forward_names`). By trial: on stand-ins of the module's class, in fp32 and 16-bit, in training and evaluation mode
and at several scales, overlay and stock forward agree (`probe_norm`, `probe_mlp`, `probe_head`). Everything else stays
stock, with the reason in the report. Nothing in the model is changed, moved or run.
"""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from transformers.modeling_layers import GradientCheckpointingLayer

from hasten.overlays import HeadOverlay, MLPOverlay, NormOverlay, Overlay
from hasten.patching.classes import installed_overlay, stock_class
from hasten.patching.contract import replaced_forward
from hasten.patching.probe_head import prove_head
from hasten.patching.probe_mlp import PROJECTIONS, prove_mlp
from hasten.patching.probe_norm import prove_norm
from hasten.patching.trial import Refused, python_attributes, trial

PROVERS = {"norm": (NormOverlay, prove_norm), "mlp": (MLPOverlay, prove_mlp), "head": (HeadOverlay, prove_head)}


def kind_of(module: nn.Module, base: nn.Module) -> str | None:
    """The overlay that a module's children fit ("norm", "mlp", "head"); "attention" and "layer" are for the report."""
    if module is base:
        return "head"
    children = {name for name, _ in module.named_children()}
    if set(PROJECTIONS) <= children:
        return "mlp"
    own = dict(module.named_parameters(recurse=False))
    if "Norm" in stock_class(module).__name__ and not children and "weight" in own:
        return "norm"
    if children and stock_class(module).__name__.endswith("Attention"):
        return "attention"
    return "layer" if isinstance(module, GradientCheckpointingLayer) else None


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal for a proof on one module to hold for another: classes, Python attributes (an activation's too),
    names and shapes of weights, and whether its forward was replaced."""
    weights = module.named_parameters(recurse=False)
    shapes = tuple((name, None if is_lazy(weight) else tuple(weight.shape)) for name, weight in weights)
    others = ((name, child) for name, child in module.named_children() if name not in PROJECTIONS)
    children = tuple((name, type(child), _values(child)) for name, child in others)
    buffers = tuple(name for name, _ in module.named_buffers(recurse=False))
    return (
        stock_class(module),
        _classes_over(module),
        _values(module),
        shapes,
        buffers,
        children,
        replaced_forward(module),
    )


def _classes_over(module: nn.Module) -> tuple[type, ...]:
    """The classes that others put over the stock class or over its overlay."""
    order = type(module).__mro__
    return order[: order.index(installed_overlay(type(module)) or stock_class(module))]


def _class_in_the_way(module: nn.Module) -> str | None:
    """Why a class that somebody put over the module prevents an overlay: its own forward runs, not the one below."""
    owner = next((kind for kind in _classes_over(module) if "forward" in kind.__dict__), None)
    return None if owner is None else f"{owner.__qualname__}, a class that was put over it, has its own forward"


def _values(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The module's Python attributes: plain values as they are, other objects by identity."""
    plain = (bool, int, float, str, type(None))
    found = python_attributes(module).items()
    return tuple((name, value if isinstance(value, plain) else id(value)) for name, value in found)


def prove(kind: str, module: nn.Module) -> tuple[type[Overlay], Any] | str:
    """(overlay, overlay_config) that do what the module's class does, or the reason why none is known.

    kind: as `kind_of` says. Draws no random numbers from the caller's generators.
    """
    if kind not in PROVERS:
        return f"{kind}s differ too much between families to be compared from outside; they need a data file"
    if reason := replaced_forward(module) or _class_in_the_way(module):
        return reason
    overlay, prover = PROVERS[kind]
    try:
        with trial():
            return overlay, prover(module)
    except Refused as refused:
        return str(refused)
