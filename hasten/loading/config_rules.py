"""Checks the numbers of a config.json by name: types, ranges, and sizes that the stored tensors must allow.

transformers checks some types when it builds the config, and no range. A rule here holds for one field name, or for all
names with an ending, at any depth of the file (`text_config`, `rope_parameters`). None stands for "not set" everywhere.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedConfig

from hasten.json_file import kind_of, shown, walk
from hasten.loading.shards import StoredTensor

Rule: TypeAlias = Callable[[Any], str | None]
"""value -> None if it is valid, else what it must be."""

LARGEST = 2**31 - 1
LAYERS_UNSEEN = 1000
"""The most layers that are built where the tensors are not here to count; no causal LM has as many."""
LAYERS_ALWAYS, EXPERTS_ALWAYS = 256, 16384
"""Counts up to these are built without a look at the tensors: a model of this size takes a second, and what does not
fit is then named tensor by tensor."""


def is_number(value: Any) -> bool:
    """Returns whether `value` is a finite int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def count(value: Any) -> str | None:
    """Validates a size: a positive integer, or a list of them with one per layer."""
    values = value if isinstance(value, list) else [value]
    fits = all(isinstance(one, int) and not isinstance(one, bool) and 1 <= one <= LARGEST for one in values)
    return None if fits and values else "must be a positive integer"


def between(low: float, high: float, open_low: bool = False) -> Rule:
    """Returns a validator of finite numbers from `low` to `high`. open_low: `low` itself is refused."""
    bounds = f"{'above' if open_low else 'from'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")

    def check(value: Any) -> str | None:
        fits = is_number(value) and low <= value <= high and not (open_low and value == low)
        return None if fits else f"must be a finite number {bounds}"

    return check


def each(rule: Rule) -> Rule:
    """Returns a validator of one value or a list of them."""
    return lambda value: (
        next((p for one in value if (p := rule(one))), None) if isinstance(value, list) else rule(value)
    )


def factors(value: Any) -> str | None:
    """Validates LongRoPE's list of one factor per frequency."""
    fits = isinstance(value, list) and value and all(is_number(one) and one > 0 for one in value)
    return None if fits else "must be a list of positive numbers"


def flag(value: Any) -> str | None:
    """Validates a boolean: text such as "false" would count as true."""
    return None if isinstance(value, bool) else "must be true or false"


def token_ids(value: Any) -> str | None:
    """Validates a token id or a list of them. -1 stands for none in old checkpoints."""
    values = value if isinstance(value, list) else [value]
    fits = all(isinstance(one, int) and not isinstance(one, bool) and -1 <= one <= LARGEST for one in values)
    return None if fits else "must be a token id or a list of them"


def mapping(value: Any) -> str | None:
    """Validates a nested object."""
    return None if isinstance(value, dict) else "must be an object"


def dtype(value: Any) -> str | None:
    """Validates the name of a floating dtype."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    fits = value == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point)
    return None if fits else "must be a floating dtype such as bfloat16"


def attention(value: Any) -> str | None:
    """Validates the name of an attention backend. One with a slash names a hub repository of compiled kernels."""
    fits = isinstance(value, str) and "/" not in value and ":" not in value
    return None if fits else "must be the name of an attention backend, such as sdpa"


number = between(-math.inf, math.inf)
positive = between(0, math.inf, open_low=True)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "d_model", "n_embd"),
        count,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "n_head", "num_heads", "n_positions"), count),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), count),
    "sliding_window": each(count),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "attention_bias", "mlp_bias", "use_qk_norm"), flag),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), token_ids),
    **dict.fromkeys(("dtype", "torch_dtype"), dtype),
    **dict.fromkeys(("attn_implementation", "_attn_implementation", "_attn_implementation_internal"), attention),
    "quantization_config": mapping,
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rotary_emb_base"), each(positive)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), each(between(0, 1, open_low=True))),
    **dict.fromkeys(("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor"), each(positive)),
    "high_freq_factor": positive,
    **dict.fromkeys(("short_factor", "long_factor"), factors),
    **dict.fromkeys(("logits_scaling", "query_pre_attn_scalar"), positive),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), positive),
    **dict.fromkeys(
        ("logit_scale", "embedding_multiplier", "residual_multiplier", "attention_multiplier"), each(number)
    ),
}
"""Field -> the validator of its value."""

ENDINGS: Mapping[str, Rule] = {
    **dict.fromkeys(("_eps", "_epsilon"), between(0, 1)),
    **dict.fromkeys(("dropout", "_pdrop", "dropout_prob", "dropout_rate", "layerdrop"), each(between(0, 1))),
    "intermediate_size": each(between(0, LARGEST)),
}
"""Ending of a field's name -> the validator of its value; `RULES` come first."""

LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
WIDTHS = ("vocab_size", "hidden_size")


def config_problems(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> list[str]:
    """Returns "FIELD=VALUE: what it must be" for each field of a parsed config.json that cannot be right.

    stored: the tensors of the checkpoint, empty where they are not here yet. Sizes are held against them, so that no
    model of a million layers is built to find that the file has four.
    """
    found = [
        f"{shown(name)}: is the name of a method of transformers' configs, and cannot be a field"
        for name in raw
        if name.startswith("__") or callable(getattr(PreTrainedConfig, name, None))
    ]
    most = max((value for name in EXPERTS if isinstance(value := raw.get(name), int)), default=None)
    for name in PER_TOKEN:
        chosen = raw.get(name)
        if most is not None and isinstance(chosen, int) and chosen > most:
            found.append(f"{name}={shown(chosen)}: must be at most the number of experts, {most}")
    for place, value, _ in walk(dict(raw)):
        name = place.rpartition(".")[2]
        rule = _rule_of(name)
        if value is None or _is_off(name, raw):
            continue
        problem = _too_large(value) if rule is None else rule(value) or _size_problem(name, value, place, stored)
        if problem is not None:
            found.append(f"{shown(place)}={shown(value)} ({kind_of(value)}): {problem}")
    return found


def _rule_of(name: str) -> Rule | None:
    counted = count if name in (*LAYERS, *WIDTHS, *PER_TOKEN) else between(0, LARGEST) if name in EXPERTS else None
    return RULES.get(name) or counted or next((rule for end, rule in ENDINGS.items() if name.endswith(end)), None)


def _too_large(value: Any) -> str | None:
    fits = not isinstance(value, int) or -(2**63) <= value < 2**63
    return None if fits else "must fit 64 bits"


def _is_off(name: str, raw: Mapping[str, Any]) -> bool:
    return name == "sliding_window" and raw.get("use_sliding_window") is False


def _size_problem(name: str, value: Any, place: str, stored: Mapping[str, StoredTensor]) -> str | None:
    """Returns why the stored tensors cannot be those of a model of this size."""
    if not isinstance(value, int):
        return None
    widest = max((size for entry in stored.values() for size in entry.shape), default=0)
    if name in LAYERS:
        most = max(LAYERS_ALWAYS, len(stored)) if stored else LAYERS_UNSEEN
        known = f"the checkpoint has {len(stored)} tensors in all" if stored else "no model has as many layers"
        return None if value <= most else known
    if name in EXPERTS:
        most = max(EXPERTS_ALWAYS, len(stored), widest)
        return None if value <= most else f"must be at most {most}"
    if name in WIDTHS and place == name and stored and value > widest:
        return f"no tensor of the checkpoint is that large; the largest dimension is {widest}"
    return None
