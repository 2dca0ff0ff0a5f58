"""Plans what `apply` will do, as data: one action per module that gets an overlay, one skip per module that does not.

Planning changes nothing. A model type with a data file is checked against the contract; one without gets only overlays
that provably do what its own modules do (see `probe`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hasten.families import FAMILIES
from hasten.families.schema import Family
from hasten.ops.glu import ACTIVATIONS
from hasten.overlays import (
    AttentionOverlay,
    BackboneOverlay,
    HeadConfig,
    HeadOverlay,
    LayerOverlay,
    MLPOverlay,
    NormOverlay,
    Overlay,
    StockHeadOverlay,
)
from hasten.patching import configs, contract, probe
from hasten.state import causal_lm_of


@dataclass(frozen=True)
class Action:
    """A planned overlay: `overlay` with `overlay_config` for the module `name` (its path below the causal LM; "" =
    itself)."""

    name: str
    overlay: type[Overlay]
    overlay_config: Any
    why: str


@dataclass(frozen=True)
class Skip:
    """A module called `name` that keeps its stock forward."""

    name: str
    kind: str
    reason: str


@dataclass
class Plan:
    """The actions of `apply`. problems: the reasons why `apply` will raise; empty = it will not."""

    model_type: str
    family: Family | None
    actions: list[Action] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model_type}: {len(self.actions)} overlays, {len(self.skips)} left stock"]
        lines += [f"  + {a.name or '(model)'}: {a.overlay.runs} ({a.why})" for a in self.actions]
        lines += [f"  - {s.name or '(model)'}: {s.kind} stays stock ({s.reason})" for s in self.skips]
        lines += [f"  ! {problem}" for problem in self.problems]
        return "\n".join(lines)


def family_of(model: nn.Module) -> Family | None:
    """Returns the data file for the model's `config.model_type`, or None."""
    return FAMILIES.get(causal_lm_of(model).config.model_type)


def plan(
    model: nn.Module,
    family: Family | None = None,
    max_seq_length: int | None = None,
    attn_implementation: str | None = None,
) -> Plan:
    """Plans overlays for `model`. `family` overrides the data file (None = by model_type). Pure: nothing is changed.

    attn_implementation: the attention backend that the user named, which then runs; None = hasten chooses.
    """
    base = causal_lm_of(model)
    chosen = family if family is not None else family_of(base)
    found = Plan(base.config.model_type, chosen)
    if chosen is None:
        _plan_unknown(base, found, max_seq_length)
    else:
        _plan_family(base, chosen, found, max_seq_length)
        backbone = configs.backbone_config(chosen, base.config, attn_implementation)
        stock = _stock_attentions(base, found)
        if stock and backbone.replaces is not None:
            backbone = replace(
                backbone, replaces=None, reason=f"the attention of {stock} layers is not under an overlay"
            )
        found.actions.append(Action("model", BackboneOverlay, backbone, f"{chosen.model_type} family"))
    for action in found.actions:
        reason = contract.replaced_forward(base.get_submodule(action.name))
        if reason is not None:
            found.problems.append(f"{action.name or 'the model'}: {reason}")
    return found


def _plan_family(base: Any, family: Family, found: Plan, max_seq_length: int | None) -> None:
    config = base.config
    roles: dict[str, tuple[type[Overlay], Callable[[Any], Any], Callable[[Any, Any], list[str]]]] = {
        "causal_lm": (HeadOverlay, lambda m: configs.head_config(family, config, max_seq_length), lambda m, f: []),
        "layer": (LayerOverlay, lambda m: configs.layer_config(family, config), contract.check_layer),
        "attention": (
            AttentionOverlay,
            lambda m: configs.attention_config(family, config, m.layer_idx),
            lambda m, f: contract.check_attention(m, f, family),
        ),
        "mlp": (
            MLPOverlay,
            lambda m: configs.mlp_config(family, config),
            lambda m, f: contract.check_mlp(m, f, ACTIVATIONS),
        ),
        "norm": (NormOverlay, lambda m: configs.norm_config(family.norm, config), contract.check_norm),
    }
    seen = set()
    for name, module in base.named_modules():
        role = contract.role_of(module, family.classes)
        if role is None:
            parent = contract.extends_recorded_class(module, family.classes)
            if parent is not None:
                reason = f"a subclass of {parent}, which the family's data file does not describe"
                found.skips.append(Skip(name, type(module).__name__, reason))
            continue
        seen.add(role)
        overlay, read, check = roles[role]
        values = read(module)
        broken = check(module, values)
        found.problems += [f"{name or 'the model'} ({type(module).__name__}): {problem}" for problem in broken]
        found.actions.append(Action(name, overlay, values, f"{family.model_type} family"))
    missing = [f"{role} ({getattr(family.classes, role)})" for role in roles if role not in seen]
    if missing:
        found.problems.append(f"no module of the recorded class for: {', '.join(missing)}, in {family.classes.module}")


def _stock_attentions(base: Any, found: Plan) -> int:
    """Counts the decoder layers whose attention ignores attention contexts."""
    planned = {action.name for action in found.actions if action.overlay is AttentionOverlay}
    layers = getattr(base.model, "layers", ())
    return sum(f"model.layers.{index}.self_attn" not in planned for index in range(len(layers)))


def _plan_unknown(base: Any, found: Plan, max_seq_length: int | None) -> None:
    """Plans what `probe` proves. A causal LM whose forward stays stock gets the methods and the length check around it."""
    proofs: dict[Any, tuple[type[Overlay], Any] | str] = {}
    for name, module in base.named_modules():
        kind = probe.kind_of(module, base)
        if kind is None:
            continue
        key = probe.signature(module)
        if key not in proofs:
            proofs[key] = probe.prove(kind, module)
        proof = proofs[key]
        if isinstance(proof, str):
            found.skips.append(Skip(name, type(module).__name__, proof))
            if module is base and contract.replaced_forward(base) is None:
                found.actions.append(Action(name, StockHeadOverlay, HeadConfig(max_seq_length=max_seq_length), proof))
            continue
        overlay, values = proof
        if module is base:
            values = replace(values, max_seq_length=max_seq_length)
        found.actions.append(Action(name, overlay, values, f"proved on this {type(module).__name__}"))
