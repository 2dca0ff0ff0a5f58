"""Checks LoRA's rank, scale and target modules. Names are matched with the model by
`hasten.training.lora`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hasten.options.arguments import unknown_names
from hasten.options.fields import AdapterFields
from hasten.options.values import Rule, broken_rules, is_integer, positive_integer, seed
from hasten.schema import fields_of, mistyped
from hasten.suggest import did_you_mean

BIASES = ("none", "all", "lora_only")


def scale(value: Any) -> str | None:
    """Validates `lora_alpha`."""
    fits = not isinstance(value, bool) and isinstance(value, int | float) and value > 0
    return None if fits else "must be a positive number such as r or 2 * r"


def probability(value: Any) -> str | None:
    """Validates `lora_dropout`."""
    fits = isinstance(value, int | float) and 0 <= value < 1
    return None if fits else "must be a probability of at least 0 and below 1"


def targets(value: Any) -> str | None:
    """Validates `target_modules`."""
    fits = bool(value) and (isinstance(value, str) or all(isinstance(name, str) for name in value))
    return None if fits else "must be module names, a regular expression or 'all-linear'"


def saved(value: Any) -> str | None:
    """Validates `modules_to_save`."""
    fits = value is None or (not isinstance(value, str) and all(isinstance(name, str) for name in value))
    return None if fits else "must be a list of module names such as ['lm_head']"


def layers(value: Any) -> str | None:
    """Validates `layers_to_transform`."""
    numbers = [value] if isinstance(value, int) else value or []
    fits = not isinstance(numbers, str) and all(is_integer(number, 0) for number in numbers)
    return None if fits else "must be a layer's index or a list of them, such as [0, 1, 2]"


def bias(value: Any) -> str | None:
    """Validates `bias`."""
    return None if value in BIASES else f"must be one of {', '.join(BIASES)}{did_you_mean(value, BIASES)}"


RULES: Mapping[str, Rule] = {
    "r": positive_integer,
    "lora_alpha": scale,
    "lora_dropout": probability,
    "random_state": seed,
    "target_modules": targets,
    "modules_to_save": saved,
    "layers_to_transform": layers,
    "bias": bias,
}


OWN_CHECKS = ("use_gradient_checkpointing", "memory_budget", "extra")
"""Arguments whose type is looked at by the check of their feature."""


def check(options: AdapterFields) -> list[str]:
    """Checks every value, and that every further name is a field of PEFT's LoraConfig."""
    typed = {
        name: kind for name, kind in fields_of(AdapterFields.__module__, "AdapterFields").items() if name not in RULES
    }
    values = {name: getattr(options, name) for name in typed if name not in OWN_CHECKS}
    found = [*broken_rules(options, RULES).values(), *mistyped(values, typed).values()]
    if options.extra:
        found += mistyped(options.extra, fields_of("peft", "LoraConfig")).values()
        # PEFT takes about a second to import, so only a call that needs its names pays for that.
        from peft import LoraConfig

        known = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
        found += unknown_names(options.extra, known, options.__dataclass_fields__, "a LoraConfig field")
    return found
