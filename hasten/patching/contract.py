"""Checks that the installed transformers classes still have the structure that the family's data file records.

Runs on the model's modules, before anything is planned. Differences that the structure does not show (the order of
casts, a missing factor) are found numerically by `hasten.testing.check_family`, which the tests run per family.
"""

from typing import Any

from torch import nn

from hasten.families.schema import Classes, Family
from hasten.ops import NormConfig
from hasten.overlays import AttentionConfig, LayerConfig, MLPConfig
from hasten.overlays.layer import BRANCH_NORMS
from hasten.patching.classes import stock_class


def role_of(module: nn.Module, recorded: Classes) -> str | None:
    """Returns "causal_lm", "layer", "attention", "mlp" or "norm" if the module's class is the recorded one, else
    None."""
    stock = stock_class(module)
    if stock.__module__ != recorded.module:
        return None
    for role in ("causal_lm", "layer", "attention", "mlp", "norm"):
        if stock.__name__ == getattr(recorded, role):
            return role
    return None


def extends_recorded_class(module: nn.Module, recorded: Classes) -> str | None:
    """Returns the recorded class that the module's own class extends; None where it is that class, or none of them."""
    names = {getattr(recorded, role) for role in ("causal_lm", "layer", "attention", "mlp", "norm")}
    above = stock_class(module).__mro__[1:]
    return next((cls.__name__ for cls in above if cls.__module__ == recorded.module and cls.__name__ in names), None)


def replaced_forward(module: nn.Module) -> str | None:
    """Returns why the instance's own `forward` prevents an overlay; None also for accelerate's hooks, which stay in
    use."""
    own = module.__dict__.get("forward")
    if own is None or (hasattr(module, "_hf_hook") and hasattr(module, "_old_forward")):
        return None
    owner = getattr(getattr(own, "__func__", own), "__qualname__", type(own).__name__)
    return f"its forward was replaced on the instance by {owner}; apply overlays before it is replaced"


def check_norm(module: nn.Module, config: NormConfig) -> list[str]:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    found = [] if eps == config.eps else [f"epsilon is {eps}, the config's is {config.eps}"]
    return found + _missing(module, {"weight"})


def check_mlp(module: nn.Module, overlay_config: MLPConfig, known: Any) -> list[str]:
    found = _missing(module, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    return (
        found
        if overlay_config.activation in known
        else [*found, f"activation {overlay_config.activation!r} is not one of {sorted(known)}"]
    )


def check_layer(module: nn.Module, overlay_config: LayerConfig) -> list[str]:
    norms = {name for name, _ in module.named_children() if name.endswith("layernorm")}
    expected = set(BRANCH_NORMS[overlay_config.residual])
    found = (
        []
        if norms == expected
        else [f"norms {sorted(norms)}, a {overlay_config.residual} layer has {sorted(expected)}"]
    )
    multiplier = getattr(module, "residual_multiplier", 1.0)
    if multiplier != overlay_config.multiplier:
        found.append(f"residual_multiplier is {multiplier}, recorded is {overlay_config.multiplier}")
    return found + _missing(module, {"self_attn", "mlp"})


def check_attention(module: nn.Module, overlay_config: AttentionConfig, family: Family) -> list[str]:
    found = _missing(module, {"q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling", "config"})
    if found:
        return found
    config: Any = module.config
    window = getattr(module, "sliding_window", None)
    if not hasattr(module, "sliding_window") and not hasattr(module, "layer_type"):
        window = getattr(config, "sliding_window", None)
    softcap = getattr(module, "attn_logit_softcapping", None)
    if family.attention.qk_norm is not None and family.attention.softcap is None:
        softcap = None  # Gemma 3 stores Gemma 2's field and does not apply it
    compared = {
        "scaling": (module.scaling, overlay_config.scale),
        "sliding window": (window, overlay_config.window),
        "score softcap": (softcap, overlay_config.softcap),
        "norm on q and k": (hasattr(module, "q_norm"), overlay_config.qk_norm is not None),
    }
    problems = [f"{name} is {is_}, recorded is {ours}" for name, (is_, ours) in compared.items() if is_ != ours]
    if overlay_config.softcap is not None and config._attn_implementation == "sdpa":
        problems.append("sdpa ignores the softcap on scores; load with attn_implementation='eager'")
    return problems


def _missing(module: nn.Module, names: set[str]) -> list[str]:
    missing = sorted(name for name in names if not hasattr(module, name))
    return [f"no {', '.join(missing)}"] if missing else []
