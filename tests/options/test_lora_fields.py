"""Fields of PEFT's LoraConfig: every one has an effect or is refused, and names of other libraries are recognised."""

import dataclasses
from typing import Any

import pytest
from peft import LoraConfig, TaskType

from hasten.options import AdapterOptions, lora_fields

PASSED_ON = {"kasa_config", "runtime_config", "use_bdlora", "velora_config"}
"""Configs of variants, which PEFT checks itself."""


def problems(**given: Any) -> list[str]:
    return AdapterOptions.from_call(**given).problems()


def test_every_field_of_the_installed_peft_is_accounted_for() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    checked = {
        *lora_fields.RULES,
        *lora_fields.FIXED,
        *lora_fields.RECORDED,
        *lora_fields.NEEDED,
        *lora_fields.UNUSABLE,
    }
    arguments = {field.name for field in dataclasses.fields(AdapterOptions)}
    assert fields == (fields & arguments) | checked | PASSED_ON


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_dora": "false"}, "use_dora='false': must be True or False"),
        ({"use_rslora": 1}, "use_rslora=1: must be True or False"),
        ({"lora_bias": "no"}, "lora_bias='no': found str, must be true or false"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"init_lora_weights": None}, "init_lora_weights=None"),
        ({"init_lora_weights": "eva"}, "needs training data"),
        ({"rank_pattern": {"q_proj": 0}}, "must map module names to ranks"),
        ({"rank_pattern": None}, "must map module names to ranks"),
        ({"alpha_pattern": {"q_proj": True}}, "must map module names to lora_alpha"),
        ({"exclude_modules": []}, "must be a list of names or a regular expression"),
        ({"target_parameters": "experts.down_proj"}, "found str, must be a list"),
        ({"trainable_token_indices": {}}, "must be a list of token ids"),
        ({"trainable_token_indices": [-1]}, "must be a list of token ids"),
        ({"layers_pattern": "layers"}, "only with layers_to_transform"),
        ({"layers_to_transform": True}, "layers_to_transform=True"),
        ({"layer_replication": [[2, 2]]}, "pairs of layers"),
        ({"eva_config": {"rho": 1.0}}, "only with init_lora_weights='eva'; it is True"),
        ({"corda_config": {}}, "only with init_lora_weights='corda'"),
        ({"lora_ga_config": {}, "init_lora_weights": "pissa"}, "only with init_lora_weights='lora_ga'; it is 'pissa'"),
        ({"qalora_group_size": 32}, "only with use_qalora=True"),
        ({"megatron_core": "my.core"}, "Megatron"),
        ({"arrow_config": {}}, "create_arrow_model"),
        ({"task_type": "SEQ_CLS"}, "must be 'CAUSAL_LM' here"),
        ({"peft_type": "IA3"}, "must be 'LORA' here"),
        ({"inference_mode": True}, "must be False here"),
        ({"revision": "main"}, "recorded from the loaded model"),
    ],
)
def test_values_without_an_effect_are_refused(given: dict[str, Any], said: str) -> None:
    found = problems(**given)
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    "given",
    [
        {"task_type": TaskType.CAUSAL_LM, "inference_mode": False, "qalora_group_size": 16, "megatron_core": "megatron.core"},
        {"layers_pattern": None, "exclude_modules": None, "rank_pattern": {}, "target_parameters": None},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {"layers_to_transform": range(2), "layers_pattern": ["layers"]},
        {"trainable_token_indices": {"embed_tokens": (1, 2)}, "alpha_pattern": {"q_proj": 2.5}},
        {"lora_ga_config": {}, "init_lora_weights": "lora_ga"},
        {"alora_invocation_tokens": [1], "use_gradient_checkpointing": False},
    ],
)  # fmt: skip
def test_values_with_an_effect_or_equal_to_the_default_are_fine(given: dict[str, Any]) -> None:
    assert problems(**given) == []


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("rank", "r"),
        ("lora_r", "r"),
        ("lora_rank", "r"),
        ("lora_dim", "r"),
        ("alpha", "lora_alpha"),
        ("dropout", "lora_dropout"),
        ("lora_target_modules", "target_modules"),
        ("lora_target", "target_modules"),
        ("lora_target_linear", 'target_modules="all-linear"'),
        ("additional_target", "modules_to_save"),
        ("lora_modules_to_save", "modules_to_save"),
        ("peft_use_dora", "use_dora"),
        ("peft_layers_to_transform", "layers_to_transform"),
        ("peft_init_lora_weights", "init_lora_weights"),
        ("lora_fan_in_fan_out", "fan_in_fan_out"),
        ("seed", "random_state"),
        ("gradient_checkpointing", "use_gradient_checkpointing"),
        ("rank_patern", "rank_pattern"),
    ],
)
def test_names_of_other_libraries_are_recognised(name: str, here: str) -> None:
    found = problems(**{name: 8})
    assert len(found) == 1 and f"(did you mean {here}" in found[0]


def test_a_name_like_no_other_is_refused_without_a_guess() -> None:
    assert problems(zzz=1) == ["'zzz' is neither an argument nor a LoraConfig field; leave it out"]
