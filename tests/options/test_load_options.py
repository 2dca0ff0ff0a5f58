"""The arguments of `from_pretrained`: order, defaults, and every problem of a call in one error."""

import dataclasses
from typing import Any

import pytest
import torch

from hasten.errors import OptionError
from hasten.options import EngineOptions, LoadOptions, bad_values
from hasten.options.fields import LoadFields
from hasten.options.load import LOAD_RULES
from hasten.weights import formats
from hasten.weights.formats import load_arguments
from hasten.weights.formats.dense import Dense

SEED_ORDER = [
    "model_name",
    "max_seq_length",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "load_in_16bit",
    "full_finetuning",
    "token",
    "device_map",
    "rope_scaling",
    "fix_tokenizer",
    "trust_remote_code",
    "use_gradient_checkpointing",
    "resize_model_vocab",
    "revision",
    "use_exact_model_name",
    "offload_embedding",
    "float32_mixed_precision",
    "fast_inference",
    "gpu_memory_utilization",
    "float8_kv_cache",
    "random_state",
    "max_lora_rank",
    "disable_log_stats",
    "qat_scheme",
    "load_in_fp8",
    "unsloth_tiled_mlp",
]


def problems(**arguments: object) -> str:
    return "\n".join(LoadOptions.from_call(**arguments).problems())


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 9), (9, 0)])
def test_fp8_cache_needs_a_gpu_with_fp8(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    found = [one for one in LoadOptions.from_call(float8_kv_cache=True).problems() if "float8" in one]
    assert len(found) == (capability == (8, 0)) and all("8.0" in one and "hasten-int8" in one for one in found)


def test_fields_stand_in_the_seeds_order() -> None:
    assert [f.name for f in dataclasses.fields(LoadOptions)][: len(SEED_ORDER)] == SEED_ORDER


def test_defaults_are_fine() -> None:
    LoadOptions().validate()


def test_positional_arguments_land_where_the_seeds_have_them() -> None:
    options = LoadOptions.from_call("owner/model", 4096, torch.bfloat16, False, True)
    assert (options.max_seq_length, options.dtype, options.load_in_8bit) == (4096, torch.bfloat16, True)
    with pytest.raises(OptionError, match="positional"):
        LoadOptions.from_call(*range(60))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "nf4"),
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_4bit": False}, None),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "int8"),
        ({"load_in_16bit": True}, "dense"),
        ({"full_finetuning": True}, None),
        ({"full_finetuning": True, "load_in_16bit": True, "load_in_4bit": False}, "dense"),
        ({"quantization_config": {"load_in_4bit": True}}, None),
    ],
)
def test_the_way_of_holding_weights(given: dict, expected: str) -> None:
    options = LoadOptions.from_call(**given)
    options.validate()
    assert (None if options.own_quantization else options.weight_format) == expected and options.own_quantization == (
        "quantization_config" in given
    )


@pytest.mark.parametrize(
    "given",
    [
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_8bit": True, "load_in_16bit": True},
        {"load_in_4bit": True, "quantization_config": {"load_in_8bit": True}},
        {"full_finetuning": True, "load_in_4bit": True},
        {"full_finetuning": True, "load_in_8bit": True},
        {"load_in_16bit": True, "dtype": torch.float32},
    ],
)
def test_contradictions_are_one_problem_each(given: dict) -> None:
    assert len(LoadOptions.from_call(**given).problems()) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"load_in_fp8": True}, "later version"),
        ({"load_in_fp8": "block"}, "later version"),
        ({"fast_inference": True}, "later version"),
        ({"qat_scheme": "int4"}, "later version"),
        ({"unsloth_tiled_mlp": 15}, "unsloth_tiled_mlp=15"),
        ({"unsloth_tiled_mlp": 0}, "unsloth_tiled_mlp=0"),
        ({"unsloth_tiled_mlp": "arctic"}, "at least 16"),
        ({"unsloth_tiled_mlp": None}, "unsloth_tiled_mlp=None"),
        ({"use_gradient_checkpointing": "offloaded"}, "did you mean offload"),
        ({"use_gradient_checkpointing": "unslot"}, "did you mean unsloth"),
        ({"max_seq_length": 0}, "max_seq_length=0"),
        ({"max_seq_length": None}, "max_seq_length=None"),
        ({"dtype": "bfloat16"}, "torch.bfloat16"),
        ({"resize_model_vocab": -1}, "resize_model_vocab=-1"),
        ({"random_state": -1}, "random_state"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"max_lora_rank": 0}, "max_lora_rank"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"model_name": None}, "model_name"),
        ({"device_map": "sequental"}, "did you mean sequential"),
        ({"device_map": {"model": "cuda:99"}}, "CUDA devices"),
        ({"torch_dtype": torch.float16}, "call it dtype"),
        ({"low_cpu_mem_usage": False}, "low_cpu_mem_usage"),
        ({"state_dict": {}}, "state_dict"),
        ({"full_finetuning": True, "offload_embedding": True}, "offload_embedding"),
    ],
)
def test_what_cannot_be_says_what_to_do(given: dict, said: str) -> None:
    assert said in problems(**given)
    assert len(LoadOptions.from_call(**given).problems()) == 1


@pytest.mark.parametrize("mode", [False, True, "unsloth", "auto"])
def test_known_checkpointing_modes_pass(mode: object) -> None:
    assert LoadOptions.from_call(use_gradient_checkpointing=mode).problems() == []


@pytest.mark.parametrize("asked", [False, True, "auto", 16, 100_000])
def test_known_tiles_pass(asked: object) -> None:
    assert LoadOptions.from_call(unsloth_tiled_mlp=asked).problems() == []


@pytest.mark.parametrize("place", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}, {"lm_head": "disk"}])
def test_known_places_pass(place: object) -> None:
    assert LoadOptions.from_call(device_map=place).problems() == []


def test_all_problems_of_a_call_are_listed_once() -> None:
    options = LoadOptions.from_call(
        max_seq_length=-1, load_in_8bit=True, load_in_16bit=True, fast_inference=True, dtype=7, device_map="gpu"
    )
    with pytest.raises(OptionError) as caught:
        options.validate()
    assert len(caught.value.problems) == 5
    for number in range(1, 6):
        assert f"  {number}. " in str(caught.value)


def test_a_format_is_named_by_the_argument_that_asks_for_it() -> None:
    names = load_arguments()
    assert LoadOptions().weight_format == names["load_in_4bit"]
    for argument, name in names.items():
        assert LoadOptions.from_call(**{argument: True}).weight_format == name
    assert LoadOptions(full_finetuning=True).weight_format is None
    assert LoadOptions(load_in_4bit=False).weight_format is None
    own = LoadOptions.from_call(quantization_config={"load_in_8bit": True})
    assert own.own_quantization and own.weight_format is None and not LoadOptions().own_quantization


def test_a_format_may_bring_an_argument_that_is_no_field() -> None:
    class Toy(Dense):
        name, load_argument, choice, exact, trainable = "toy", "load_in_toy", None, False, False

    with formats.registered(Toy()):
        assert LoadOptions.from_call(load_in_toy=True).weight_format == "toy"
        assert LoadOptions.from_call(load_in_toy=True, full_finetuning=True).problems()


def test_the_engines_arguments_stand_together() -> None:
    options = LoadOptions(gpu_memory_utilization=0.7, max_lora_rank=32)
    assert options.engine_options == EngineOptions(gpu_memory_utilization=0.7, max_lora_rank=32)
    assert set(EngineOptions.__dataclass_fields__) <= set(LoadFields.__dataclass_fields__)
    assert all(
        getattr(EngineOptions(), f.name) == getattr(LoadOptions(), f.name) for f in dataclasses.fields(EngineOptions)
    )


def test_every_rule_is_about_an_argument_and_holds_for_its_default() -> None:
    assert set(LOAD_RULES) <= set(LoadFields.__dataclass_fields__)
    assert not bad_values(LoadOptions())
