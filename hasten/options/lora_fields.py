"""Checks the fields of PEFT's LoraConfig that are not arguments of `get_peft_model` themselves: values without an effect
are refused."""

from collections.abc import Callable, Mapping
from typing import Any

from hasten.options.fields import AdapterFields
from hasten.options.values import Rule, is_integer

FIXED: Mapping[str, Any] = {"task_type": "CAUSAL_LM", "peft_type": "LORA", "inference_mode": False}
"""Fields that have one possible value here: a causal LM gets a LoRA that trains."""
RECORDED = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision")
"""Fields that describe the base or PEFT itself, and are filled in when the adapter is made or saved."""
NEEDED: Mapping[str, tuple[str, Any]] = {
    "eva_config": ("init_lora_weights", "eva"),
    "corda_config": ("init_lora_weights", "corda"),
    "lora_ga_config": ("init_lora_weights", "lora_ga"),
    "qalora_group_size": ("use_qalora", True),
}
"""Field -> the argument, and its value, without which PEFT ignores the field."""
LISTS = (list, tuple, set, frozenset, range)
UNUSABLE: Mapping[str, str] = {
    "arrow_config": "is set by PEFT's create_arrow_model(); call that on the loaded model instead",
    "megatron_config": "is for Megatron's parallel layers, and a model loaded here has none; leave it out",
    "megatron_core": "is for Megatron's parallel layers, and a model loaded here has none; leave it out",
    "monteclora_config": "makes an adapter that cannot be loaded again here; use PEFT's get_peft_model() instead",
}
"""Field -> why this call cannot use it."""


def boolean(value: Any) -> str | None:
    """Validates a switch; text such as "false" would be true."""
    return None if isinstance(value, bool) else "must be True or False"


def names(value: Any) -> str | None:
    """Validates a list of names."""
    return None if is_list_of(value, lambda one: isinstance(one, str)) else "must be a list of names, at least one"


def names_or_pattern(value: Any) -> str | None:
    """Validates a list of names, or a regular expression."""
    fits = (isinstance(value, str) and bool(value)) or names(value) is None
    return None if fits else "must be a list of names or a regular expression"


def ranks(value: Any) -> str | None:
    """Validates `rank_pattern`."""
    fits = isinstance(value, Mapping) and all(isinstance(k, str) and is_integer(v, 1) for k, v in value.items())
    return None if fits else "must map module names to ranks, which are positive integers"


def scales(value: Any) -> str | None:
    """Validates `alpha_pattern`."""
    fits = isinstance(value, Mapping) and all(
        isinstance(k, str) and isinstance(v, int | float) and not isinstance(v, bool) and v > 0
        for k, v in value.items()
    )
    return None if fits else "must map module names to lora_alpha, which is a positive number"


def token_rows(value: Any) -> str | None:
    """Validates `trainable_token_indices`: token ids, or a dict of module name -> token ids."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    fits = bool(lists) and all(token_ids(one) is None and len(set(one)) == len(one) for one in lists)
    return None if fits else "must be a list of token ids without repetition, or a dict of module name -> such a list"


def token_ids(value: Any) -> str | None:
    """Validates a list of token ids."""
    return None if is_list_of(value, lambda one: is_integer(one, 0)) else "must be a list of token ids, at least one"


def layer_ranges(value: Any) -> str | None:
    """Validates `layer_replication`."""
    fits = is_list_of(
        value, lambda pair: is_list_of(pair, lambda n: is_integer(n, 0)) and len(pair) == 2 and pair[0] < pair[1]
    )
    return None if fits else "must be a list of [start, end) pairs of layers, such as [[0, 4], [2, 5]]"


RULES: Mapping[str, Rule] = {
    "alora_invocation_tokens": token_ids,
    "alpha_pattern": scales,
    "ensure_weight_tying": boolean,
    "exclude_modules": names_or_pattern,
    "fan_in_fan_out": boolean,
    "layer_replication": layer_ranges,
    "layers_pattern": names_or_pattern,
    "lora_bias": boolean,
    "rank_pattern": ranks,
    "target_parameters": names,
    "trainable_token_indices": token_rows,
    "use_qalora": boolean,
}


def problems(options: AdapterFields, defaults: Any) -> list[str]:
    """Returns the problems of `options.extra`. defaults: a LoraConfig without arguments; values equal to its are fine."""
    found = []
    for name, value in options.extra.items():
        if hasattr(defaults, name) and type(value) is type(usual := getattr(defaults, name)) and value == usual:
            continue
        problem = RULES[name](value) if name in RULES else _without_effect(name, value, options)
        if problem is not None:
            found.append(f"{name}={value!r}: {problem}")
    if options.extra.get("layers_pattern") and options.layers_to_transform is None:
        found.append("layers_pattern has an effect only with layers_to_transform; pass both or none")
    if options.extra.get("alora_invocation_tokens") and options.use_gradient_checkpointing is not False:
        found.append(
            "alora_invocation_tokens needs use_gradient_checkpointing=False: PEFT finds the tokens once per forward, and "
            "layers that are recomputed in the backward would not know them"
        )
    return found


def _without_effect(name: str, value: Any, options: AdapterFields) -> str | None:
    """Returns why a value would be ignored, None if it would not."""
    if name in FIXED:
        given = getattr(value, "value", value)  # PEFT's enums are as good as their names
        return None if given == FIXED[name] else f"must be {FIXED[name]!r} here; leave it out"
    if name in RECORDED:
        return "is recorded from the loaded model; leave it out"
    if name in UNUSABLE:
        return UNUSABLE[name]
    argument, needed = NEEDED.get(name, (None, None))
    if argument is None:
        return None
    asked = options.extra.get(argument, getattr(options, argument, None))
    return None if asked == needed else f"has an effect only with {argument}={needed!r}; it is {asked!r}"


def is_list_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Returns whether `value` is a list (or tuple, set, range) of at least one element, all of which fit."""
    return isinstance(value, LISTS) and len(value) > 0 and all(fits(one) for one in value)
