"""Finds, by comparing outputs, which overlay applies to a module of a model type without a data file.

The module's own forward is compared with the op at each candidate config, on random input of the module's dtype, within
a few roundings. A module that no candidate reproduces stays stock.
"""

from itertools import product
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hasten.ops import NormConfig, glu, norm
from hasten.ops.glu import ACTIVATIONS
from hasten.overlays import HeadConfig, HeadOverlay, MLPConfig, MLPOverlay, NormOverlay, Overlay
from hasten.patching.classes import installed_overlay, stock_class

TOKENS = 3


def kind_of(module: nn.Module, base: nn.Module) -> str | None:
    """The overlay that a module's children fit ("norm", "mlp", "head"); "attention" and "layer" are for the report."""
    if module is base:
        return "head"
    children = {name for name, _ in module.named_children()}
    if {"gate_proj", "up_proj", "down_proj"} <= children:
        return "mlp"
    own = dict(module.named_parameters(recurse=False))
    if "Norm" in stock_class(module).__name__ and not children and "weight" in own:
        return "norm"
    if children and stock_class(module).__name__.endswith("Attention"):
        return "attention"
    return "layer" if isinstance(module, GradientCheckpointingLayer) else None


def signature(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal for a proof on one module to hold for another: classes, epsilon, parameter shapes and
    dtypes."""
    ours = installed_overlay(type(module))
    over = type(module).__mro__[: type(module).__mro__.index(ours or stock_class(module))]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False))
    return (stock_class(module), over, eps, shapes)


def prove(kind: str, module: nn.Module, max_seq_length: int | None) -> tuple[type[Overlay], Any] | str:
    """(overlay, overlay_config) that reproduce the module's outputs, or the reason why none is known."""
    with torch.no_grad():
        if kind == "norm":
            return _prove_norm(module)
        if kind == "mlp":
            return _prove_mlp(module)
        if kind == "head":
            return _prove_head(module, max_seq_length)
    return f"{kind}s differ too much between families to be compared from outside; they need a data file"


def _random(*shape: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(*shape, generator=generator).to(like.device, dtype)


def _same(ours: torch.Tensor, theirs: Any) -> bool:
    if not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    tolerance = 4 * torch.finfo(ours.dtype).eps
    return bool(
        torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    )


def _prove_norm(module: nn.Module) -> tuple[type[Overlay], Any] | str:
    weight: torch.Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or weight.dim() != 1 or getattr(module, "bias", None) is not None:
        return "not a norm over one axis with a weight, an epsilon and no bias"
    # An all-ones or all-zeros weight cannot distinguish (1 + w) from w, so a random one is used.
    trial = nn.Parameter(_random(weight.shape[0], like=weight), requires_grad=False)
    x = _random(TOKENS, weight.shape[0], like=weight) * 3 + 1
    module.weight = trial
    try:
        theirs = module(x)
    finally:
        module.weight = weight
    for variant in product(("rms", "layer"), (False, True), (False, True)):
        rule = NormConfig(eps, *variant)
        if _same(norm(x, trial, rule), theirs):
            return NormOverlay, rule
    return "its outputs match no norm that hasten has"


def _prove_mlp(module: nn.Module) -> tuple[type[Overlay], Any] | str:
    gate: Any = module.gate_proj
    x = _random(TOKENS, gate.in_features, like=next(module.parameters()))
    theirs = module(x)
    for name in ACTIVATIONS:
        ours = module.down_proj(glu(module.gate_proj(x), module.up_proj(x), name))  # pyright: ignore[reportCallIssue]
        if _same(ours, theirs):
            return MLPOverlay, MLPConfig(name)
    return "its outputs match no gated MLP that hasten has"


def _prove_head(model: Any, max_seq_length: int | None) -> tuple[type[Overlay], Any] | str:
    if not hasattr(model, "lm_head") or not hasattr(model, "model"):
        return "not a backbone called `model` with a head called `lm_head`"
    ids = torch.arange(TOKENS, device=model.lm_head.weight.device)[None] % model.lm_head.weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        theirs = model(input_ids=ids, use_cache=False).logits
        hidden = model.model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    finally:
        model.train(was_training)
    if _same(model.lm_head(hidden), theirs):
        return HeadOverlay, HeadConfig(1.0, None, max_seq_length)
    return "its logits are not just lm_head(last hidden state)"
