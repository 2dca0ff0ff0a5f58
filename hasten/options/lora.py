"""Checks LoRA's rank, scale and target modules, and the further fields of PEFT's LoraConfig. Names are matched with the
model by `hasten.training.targets`."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from hasten.options import lora_fields
from hasten.options.arguments import unknown_names
from hasten.options.fields import AdapterFields
from hasten.options.values import Rule, broken_rules, is_integer, positive_integer, seed
from hasten.schema import fields_of, mistyped
from hasten.suggest import did_you_mean

BIASES = ("none", "all", "lora_only")
OTHER_NAMES: Mapping[str, str] = {
    "additional_target": "modules_to_save",
    "alpha": "lora_alpha",
    "dora": "use_dora",
    "dropout": "lora_dropout",
    "gradient_checkpointing": "use_gradient_checkpointing",
    "init": "init_lora_weights",
    "init_weights": "init_lora_weights",
    "layers": "layers_to_transform",
    "lora_dim": "r",
    "lora_layers": "layers_to_transform",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_scale": "lora_alpha",
    "lora_target": "target_modules",
    "lora_target_linear": 'target_modules="all-linear"',
    "rank": "r",
    "rslora": "use_rslora",
    "scaling": "lora_alpha",
    "seed": "random_state",
    "target_layers": "target_modules",
    "targets": "target_modules",
    "token_indices": "trainable_token_indices",
    "trainable_tokens": "trainable_token_indices",
}
"""What other libraries call an argument -> its name here, where the two are not similar."""
PREFIXES = ("peft_", "lora_", "use_")


def scale(value: Any) -> str | None:
    """Validates `lora_alpha`."""
    fits = not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < float("inf")
    return None if fits else "must be a positive number such as r or 2 * r"


def probability(value: Any) -> str | None:
    """Validates `lora_dropout`."""
    fits = isinstance(value, int | float) and 0 <= value < 1
    return None if fits else "must be a probability of at least 0 and below 1"


def targets(value: Any) -> str | None:
    """Validates `target_modules`."""
    fits = isinstance(value, str | Iterable) and bool(value) and all(isinstance(name, str) for name in value)
    return None if fits else "must be module names, a regular expression or 'all-linear'"


def saved(value: Any) -> str | None:
    """Validates `modules_to_save`."""
    fits = value is None or (not isinstance(value, str) and all(isinstance(name, str) for name in value))
    return None if fits else "must be a list of module names such as ['lm_head']"


def layers(value: Any) -> str | None:
    """Validates `layers_to_transform`."""
    fits = value is None or is_integer(value, 0) or lora_fields.is_list_of(value, lambda one: is_integer(one, 0))
    return None if fits else "must be a layer's index or a list of them, such as [0, 1, 2]"


def bias(value: Any) -> str | None:
    """Validates `bias`."""
    return None if value in BIASES else f"must be one of {', '.join(BIASES)}{did_you_mean(value, BIASES)}"


def initialisation(value: Any) -> str | None:
    """Validates `init_lora_weights`. PEFT knows which names exist, and refuses others when it makes the adapter."""
    if value == "eva":
        return (
            "needs training data, which this call does not have; make the adapter with PEFT's get_peft_model() on the "
            "loaded model, then call PEFT's initialize_lora_eva_weights()"
        )
    return None if isinstance(value, bool | str) else "must be True, False or the name of an initialisation"


RULES: Mapping[str, Rule] = {
    "r": positive_integer,
    "lora_alpha": scale,
    "lora_dropout": probability,
    "random_state": seed,
    "target_modules": targets,
    "modules_to_save": saved,
    "layers_to_transform": layers,
    "bias": bias,
    "use_rslora": lora_fields.boolean,
    "use_dora": lora_fields.boolean,
    "init_lora_weights": initialisation,
}


OWN_CHECKS = ("use_gradient_checkpointing", "memory_budget", "extra")
"""Arguments whose type is looked at by the check of their feature."""


def check(options: AdapterFields) -> list[str]:
    """Checks every value, and that every further name is a field of PEFT's LoraConfig with a value that has an effect."""
    typed = {
        name: kind for name, kind in fields_of(AdapterFields.__module__, "AdapterFields").items() if name not in RULES
    }
    values = {name: getattr(options, name) for name in typed if name not in OWN_CHECKS}
    broken = broken_rules(options, RULES)
    if options.extra.get("target_parameters") and not options.target_modules:
        broken.pop("target_modules", None)  # parameters alone are enough
    found = [*broken.values(), *mistyped(values, typed).values()]
    if options.layers_to_transform is not None and isinstance(options.target_modules, str):
        found.append(
            f"layers_to_transform={options.layers_to_transform!r} needs target_modules as a list of names; with "
            f"target_modules={options.target_modules!r}, put the layers into the regular expression"
        )
    if options.extra:
        wrong = mistyped(options.extra, fields_of("peft", "LoraConfig"))
        found += wrong.values()
        # PEFT takes about a second to import, so only a call that needs its names pays for that.
        from peft import LoraConfig

        known = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
        found += _unknown(options, known)
        typed_right = {name: value for name, value in options.extra.items() if name not in wrong}
        found += lora_fields.problems(dataclasses.replace(options, extra=typed_right), LoraConfig())
    return found


def _unknown(options: AdapterFields, known: set[str]) -> list[str]:
    """Returns a problem for each further name that is no field, with the argument of another library's name."""
    arguments = [name for name in options.__dataclass_fields__ if name != "extra"]
    kind = "a LoraConfig field"
    found = []
    for name in options.extra:
        here = OTHER_NAMES.get(name) or _without_prefix(name, [*arguments, *known])
        if name in known or here is None:
            found += unknown_names([name], known, arguments, kind)
        else:
            found.append(f"{name!r} is neither an argument nor {kind} (did you mean {here}?)")
    return found


def _without_prefix(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is equal except for prefixes of other libraries, such as lora_target_modules."""
    return next((one for one in known if _bare(one) == _bare(name)), None)


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
