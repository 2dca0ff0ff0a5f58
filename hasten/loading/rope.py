"""Plans RoPE scaling: as the caller asks, or as needed for a `max_seq_length` beyond the checkpoint's.

transformers keeps the parameters in `config.rope_parameters`: one dict, or one per kind of layer (Gemma 3). The meaning
of `max_position_embeddings` depends on the scaling type, by convention of the published checkpoints:
- "dynamic", and "linear" in one dict for all layers: `max_position_embeddings` stays the length before scaling;
- all other types, and "linear" in a dict per kind of layer: it is the length after scaling.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hasten.families.schema import Family
from hasten.suggest import did_you_mean

KNOWN = ("default", *sorted(ROPE_INIT_FUNCTIONS))
NEEDS_ORIGINAL = ("llama3", "longrope", "yarn")
GLOBAL = "full_attention"


@dataclass
class RopePlan:
    """changes: fields to set on the config. notes: for the report. problems: why the scaling is impossible."""

    changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def plan_rope(config: Any, family: Family | None, scaling: Mapping[str, Any] | None, max_seq_length: int) -> RopePlan:
    """Plans the changes of the (text) config for `scaling` and `max_seq_length`. Does not change the config."""
    plan = RopePlan()
    limit = getattr(config, "max_position_embeddings", None)
    parameters = _rope_of(config)
    if scaling is not None:
        if parameters is None or limit is None:
            plan.problems.append(
                f"rope_scaling was given, but {config.model_type} has no rotary positions; leave it out"
            )
            return plan
        _plan_scaling(config, plan, dict(scaling), parameters)
    elif limit is not None:
        _plan_extension(config, family, plan, parameters, max_seq_length)
    if scaling is not None and not plan.problems:
        reach = _reach(plan.changes["max_position_embeddings"], *_global(plan.changes["rope_parameters"]))
        if max_seq_length > reach:
            plan.problems.append(
                f"rope_scaling={dict(scaling)!r} reaches {reach} positions, max_seq_length={max_seq_length} needs more; "
                "raise the factor or lower max_seq_length"
            )
    return plan


def _rope_of(config: Any) -> dict[str, Any] | None:
    parameters = getattr(config, "rope_parameters", None)
    return copy.deepcopy(dict(parameters)) if parameters else None


def _global(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns (the dict of the layers with full attention, whether it is one of several)."""
    nested = all(isinstance(value, dict) or value is None for value in parameters.values())
    if not nested:
        return parameters, False  # pyright: ignore[reportReturnType]
    return parameters.get(GLOBAL) or next(value for value in parameters.values() if value), True


def _type_of(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _original(limit: int, rope: Mapping[str, Any], nested: bool) -> int:
    """Returns the length before any scaling."""
    if rope.get("original_max_position_embeddings"):
        return rope["original_max_position_embeddings"]
    return limit if _states_unscaled(_type_of(rope), nested) else round(limit / float(rope.get("factor") or 1.0))


def _states_unscaled(kind: str, nested: bool) -> bool:
    """Returns whether `max_position_embeddings` stays the length before scaling (transformers' dynamic formula needs it
    so)."""
    return kind == "dynamic" or (kind == "linear" and not nested)


def _reach(limit: int, rope: Mapping[str, Any], nested: bool) -> int:
    """Returns the longest sequence, in tokens, that a checkpoint with this config supports."""
    factor = float(rope.get("factor") or 1.0)
    if _type_of(rope) in ("default", "longrope"):
        return limit
    if _type_of(rope) in NEEDS_ORIGINAL:
        return max(limit, int(_original(limit, rope, nested) * factor))
    return int(limit * factor) if _states_unscaled(_type_of(rope), nested) else limit


def _plan_scaling(config: Any, plan: RopePlan, scaling: dict[str, Any], parameters: dict[str, Any]) -> None:
    if any(isinstance(value, Mapping) for value in scaling.values()):
        plan.problems.append("rope_scaling holds dicts per kind of layer; pass the one for the full-attention layers")
        return
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "")
    if kind not in KNOWN:
        hint = did_you_mean(kind, KNOWN, count=2)
        plan.problems.append(f"rope_scaling has the rope_type {kind!r}{hint}; transformers knows {', '.join(KNOWN)}")
        return
    rope, nested = _global(parameters)
    original = _original(config.max_position_embeddings, rope, nested)
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if kind in NEEDS_ORIGINAL:
        scaling.setdefault("original_max_position_embeddings", original)
    rope.clear()
    rope.update({**kept, **scaling})
    factor = rope.get("factor")
    if factor is not None and (not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1):
        plan.problems.append(f"rope_scaling has factor={factor!r}; pass a number of at least 1")
        return
    length = config.max_position_embeddings
    if _states_unscaled(kind, nested) or kind == "default":
        length = original
    elif factor:
        length = int(rope.get("original_max_position_embeddings", original) * float(factor))
    plan.changes = {"rope_parameters": parameters, "max_position_embeddings": length}
    if missing := _refused_by_transformers(config, plan.changes):
        plan.problems.append(f"rope_scaling={scaling!r} is incomplete: {missing}; add what is missing")
        return
    plan.notes.append(f"rope: {_described(rope)}, as asked")


def _refused_by_transformers(config: Any, changes: Mapping[str, Any]) -> str | None:
    trial = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(trial, name, copy.deepcopy(value))
    try:
        trial.validate_rope()
    except (KeyError, TypeError, ValueError) as error:
        return str(error.args[0] if error.args else error)
    return None


def _plan_extension(
    config: Any, family: Family | None, plan: RopePlan, parameters: dict[str, Any] | None, length: int
) -> None:
    limit = config.max_position_embeddings
    if parameters is None:
        if 0 <= limit < length:  # -1 is how transformers says that relative positions have no limit
            plan.problems.append(
                f"max_seq_length={length} is beyond the {limit} positions that this {config.model_type} has learned, and "
                f"without rotary positions they cannot be extended; use max_seq_length={limit} or less"
            )
        return
    if limit < 1:
        plan.problems.append(f"the config's max_position_embeddings={limit}: must be a positive integer")
        return
    rope, nested = _global(parameters)
    reach = _reach(limit, rope, nested)
    if length <= reach:
        return
    if _all_windowed(config, family, limit):
        plan.changes = {"max_position_embeddings": length}
        plan.notes.append(
            f"rope: unchanged for max_seq_length={length} (checkpoint: {limit}); every rotated layer has a window"
        )
        return
    kind = _type_of(rope)
    ratio = length / reach
    original = _original(limit, rope, nested)
    if kind == "default":
        rope.update(rope_type="linear", factor=length / limit)
    elif kind == "yarn":
        rope["factor"] = length / original
    elif kind == "longrope":
        rope["long_factor"] = [float(value) * ratio for value in rope["long_factor"]]
        rope["factor"] = length / original
    elif kind in KNOWN:
        rope["factor"] = float(rope.get("factor") or 1.0) * ratio
    else:
        plan.problems.append(
            f"max_seq_length={length} is beyond the checkpoint's {reach}, and its rope type {kind!r} cannot be "
            f"extended; use max_seq_length={reach} or less"
        )
        return
    kept = _states_unscaled(_type_of(rope), nested)
    plan.changes = {"rope_parameters": parameters, "max_position_embeddings": limit if kept else length}
    plan.notes.append(f"rope: extended from {reach} to {length} positions, {_described(rope)}")


def _all_windowed(config: Any, family: Family | None, limit: int) -> bool:
    """Returns whether every layer with RoPE has a sliding window within the checkpoint's length, so that no extension
    is needed."""
    window = getattr(config, "sliding_window", None)
    if family is None or not window or window > limit:
        return False
    kinds = getattr(config, "layer_types", None)
    every = family.attention.window == "always" or bool(kinds and all(kind == "sliding_attention" for kind in kinds))
    return every or (family.attention.rope_layers == "sliding" and family.attention.window == "by_layer")


def _described(rope: Mapping[str, Any]) -> str:
    factor = rope.get("factor")
    return _type_of(rope) + (f" factor {factor:g}" if isinstance(factor, int | float) else "")
