"""The arguments of `get_peft_model`: order, defaults, and every problem of a call in one error."""

import dataclasses

import pytest

from hasten.options import AdapterOptions

ADAPTER_ORDER = [
    "r",
    "target_modules",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_gradient_checkpointing",
    "random_state",
    "use_rslora",
    "loftq_config",
    "modules_to_save",
]


def test_fields_stand_in_the_seeds_order() -> None:
    assert [f.name for f in dataclasses.fields(AdapterOptions)][: len(ADAPTER_ORDER)] == ADAPTER_ORDER


def test_defaults_are_fine() -> None:
    AdapterOptions().validate()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 8.0}, "r=8.0"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"bias": "lora"}, "did you mean lora_only"),
        ({"target_modules": []}, "target_modules"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"qat_scheme": "int4"}, "later version"),
        ({"use_gradient_checkpointing": "offloaded"}, "did you mean offload"),
        ({"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "gaussian"}, "loftq_config"),
        ({"rank_patern": {}}, "did you mean rank_pattern"),
    ],
)
def test_adapter_problems(given: dict, said: str) -> None:
    found = AdapterOptions.from_call(**given).problems()
    assert len(found) == 1
    assert said in found[0]


def test_adapter_options_take_lora_config_fields() -> None:
    options = AdapterOptions.from_call(r=8, rank_pattern={"q_proj": 4}, target_modules="all-linear")
    options.validate()
    assert dict(options.extra) == {"rank_pattern": {"q_proj": 4}}
    assert options.target_modules == "all-linear"


def test_equal_adapter_calls_compare_equal() -> None:
    first = AdapterOptions.from_call(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    assert first == AdapterOptions.from_call(target_modules=("q_proj", "v_proj"), modules_to_save=("lm_head",))
    assert first != AdapterOptions.from_call(target_modules=["q_proj"], modules_to_save=["lm_head"])
