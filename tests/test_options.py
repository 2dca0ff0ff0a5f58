"""The arguments as dataclasses: the seeds' order and defaults, and every problem of a call in one error."""

import dataclasses

import pytest
import torch

from hasten.errors import OptionError
from hasten.options import AdapterOptions, LoadOptions, none_if_left_out

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


def problems(**arguments: object) -> str:
    return "\n".join(LoadOptions.from_call(**arguments).problems())


def test_fields_stand_in_the_seeds_order() -> None:
    assert [f.name for f in dataclasses.fields(LoadOptions)][: len(SEED_ORDER)] == SEED_ORDER
    assert [f.name for f in dataclasses.fields(AdapterOptions)][: len(ADAPTER_ORDER)] == ADAPTER_ORDER


def test_defaults_are_fine() -> None:
    LoadOptions().validate()
    AdapterOptions().validate()


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
        ({"load_in_4bit": False}, "none"),
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "int8"),
        ({"load_in_16bit": True}, "none"),
        ({"full_finetuning": True}, "none"),
        ({"full_finetuning": True, "load_in_16bit": True, "load_in_4bit": False}, "none"),
        ({"quantization_config": {"load_in_4bit": True}}, "own"),
    ],
)
def test_the_way_of_holding_weights(given: dict, expected: str) -> None:
    options = LoadOptions.from_call(**given)
    options.validate()
    assert options.quantization == expected


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


def test_a_left_out_4bit_flag_is_told_from_an_explicit_one() -> None:
    @none_if_left_out("load_in_4bit")
    def load(name: str, load_in_4bit: bool = True, **kwargs: object) -> tuple[object, dict]:
        return load_in_4bit, kwargs

    assert load("x") == (None, {})
    assert load("x", True) == (True, {})
    assert load("x", load_in_4bit=False, more=1) == (False, {"more": 1})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"load_in_fp8": True}, "later version"),
        ({"load_in_fp8": "block"}, "later version"),
        ({"fast_inference": True}, "later version"),
        ({"float8_kv_cache": True}, "later version"),
        ({"qat_scheme": "int4"}, "later version"),
        ({"unsloth_tiled_mlp": 15}, "unsloth_tiled_mlp=15"),
        ({"unsloth_tiled_mlp": 0}, "unsloth_tiled_mlp=0"),
        ({"unsloth_tiled_mlp": "arctic"}, "from 16 on"),
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
