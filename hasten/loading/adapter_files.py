"""Checks an adapter's files before PEFT reads them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftType
from safetensors import safe_open

from hasten.errors import CheckpointError
from hasten.json_file import kind_of, read_object, shown
from hasten.loading.config_rules import Rule, between, count, flag, mapping, positive
from hasten.loading.foreign import parsing
from hasten.loading.shards import FLOATS, read_header
from hasten.schema.declared import fields_of
from hasten.schema.typed import mistyped
from hasten.weights.finite import described, nonfinite_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BIASES = ("none", "all", "lora_only")
LARGEST_RANK = 2**16


def rank(value: Any) -> str | None:
    """Validates `r`."""
    fits = isinstance(value, int) and count(value) is None and value <= LARGEST_RANK
    return None if fits else f"must be an integer from 1 to {LARGEST_RANK}"


def text(value: Any) -> str | None:
    """Validates a name."""
    return None if isinstance(value, str) and "\0" not in value else "must be text"


def names(value: Any) -> str | None:
    """Validates a list of module names, or a regular expression."""
    fits = isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))
    return None if fits else "must be a list of module names, or a regular expression"


def layers(value: Any) -> str | None:
    """Validates `layers_to_transform`."""
    values = value if isinstance(value, list) else [value]
    fits = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in values)
    return None if fits else "must be a layer's index or a list of them"


def pattern(rule: Rule) -> Rule:
    """Returns a validator of {module name: value}."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "must be an object of module names and values"
        return next((f"{shown(name)}: {problem}" for name, one in value.items() if (problem := rule(one))), None)

    return check


def bias(value: Any) -> str | None:
    """Validates `bias`."""
    return None if value in BIASES else f"must be one of {', '.join(BIASES)}"


def initialisation(value: Any) -> str | None:
    """Validates `init_lora_weights`."""
    return None if isinstance(value, bool | str) else "must be true, false or the name of an initialisation"


RULES: Mapping[str, Rule] = {
    "r": rank,
    "lora_alpha": positive,
    "lora_dropout": between(0, math.nextafter(1, 0)),
    "target_modules": names,
    "exclude_modules": names,
    "modules_to_save": names,
    "layers_to_transform": layers,
    "layers_pattern": names,
    "rank_pattern": pattern(rank),
    "alpha_pattern": pattern(positive),
    "bias": bias,
    "init_lora_weights": initialisation,
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode"), flag),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_type", "task_type"), text),
}


PEFT_TYPES = frozenset(kind.value for kind in PeftType)
ATTACHED = ("LORA", "TRAINABLE_TOKENS")
"""Types of adapters that hasten attaches, by PEFT's names."""


def rule_of(name: str) -> Rule | None:
    """Returns the validator of a field; the settings of a method (`loftq_config`, ...) are objects."""
    return RULES.get(name) or (mapping if name.endswith("_config") else None)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Returns the content of an adapter_config.json. Raises CheckpointError that names the fields which cannot be
    right."""
    found = read_object(path, CheckpointError)
    kind = found.get("peft_type")
    if kind in PEFT_TYPES and kind not in ATTACHED:  # before its fields, which mean other things there
        raise CheckpointError(f"{path.parent} has an adapter of type {kind}; hasten attaches only LoRA adapters")
    problems = [problem for name, value in found.items() if (problem := _problem(name, value)) is not None]
    if problems:
        lines = "".join(f"\n  - {line}" for line in problems)
        raise CheckpointError(
            f"{path} has fields that cannot be right ({len(problems)}). Save the adapter again.{lines}"
        )
    return found


def _problem(name: str, value: Any) -> str | None:
    """Returns what is wrong with a field: by its rule here, or by what PEFT declares for it."""
    rule = rule_of(name)
    if value is None:
        return None
    if rule is not None:
        problem = rule(value)
    else:
        fields = fields_of("peft", "LoraConfig")
        problem = f"must be {fields[name]}" if mistyped({name: value}, fields) else None
    return None if problem is None else f"{shown(name)}={shown(value)} ({kind_of(value)}): {problem}"


def check_adapter_files(folder: Path) -> None:
    """Raises CheckpointError, naming file and field or tensor, for an adapter whose config cannot be right, or whose
    weights are damaged, no floats, NaN or infinite."""
    read_adapter_config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from error
    other = [f"{name} ({entry.dtype})" for name, entry in header.items() if entry.dtype not in FLOATS]
    if other:
        raise CheckpointError(f"{path} has tensors that are no floats: {', '.join(other[:5])}. Save the adapter again")
    with parsing(str(path), CheckpointError, "Copy or download it again"), safe_open(path, framework="pt") as file:
        found = nonfinite_names((name, file.get_tensor(name)) for name in header)
    if found:
        raise CheckpointError(f"{path}: {described(found)}. The training run diverged; use an earlier checkpoint")
