"""Arguments of another type: text above all, which Python takes for true."""

from typing import Any

import pytest

from hasten.errors import OptionError
from hasten.options import AdapterOptions, LoadOptions

BOOLS = (
    "load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning", "fix_tokenizer", "trust_remote_code", "use_exact_model_name",
    "offload_embedding", "float32_mixed_precision", "fast_inference", "float8_kv_cache", "disable_log_stats", "use_safetensors",
    "force_download", "local_files_only", "disable_mmap", "offload_buffers",
)  # fmt: skip


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("value", ["false", "no", 1, 0.0, [True]])
def test_a_flag_is_true_or_false(name: str, value: Any) -> None:
    found = LoadOptions.from_call(**{name: value}).problems()
    assert any(problem.startswith(f"{name}={value!r}: found") and "true or false" in problem for problem in found), (
        found
    )


@pytest.mark.parametrize(
    ("given", "kind"),
    [({"revision": 3}, "int"), ({"cache_dir": ["a"]}, "list"), ({"subfolder": 1}, "int"), ({"token": 1.5}, "float"),
     ({"key_mapping": "a"}, "str"), ({"load_in_fp8": 3.5}, "float")],
)  # fmt: skip
def test_other_arguments(given: dict[str, Any], kind: str) -> None:
    assert any(f"found {kind}, must be" in problem for problem in LoadOptions.from_call(**given).problems())


@pytest.mark.parametrize(
    "given",
    [{"use_rslora": "false"}, {"use_dora": "no"}, {"use_dora": 1}, {"init_lora_weights": 3}, {"loftq_config": "4"},
     {"fan_in_fan_out": "false"}, {"rank_pattern": "a"}, {"lora_bias": "true"}],
)  # fmt: skip
def test_adapters(given: dict[str, Any]) -> None:
    (name, value), = given.items()  # fmt: skip
    assert any(
        p.startswith((f"{name}={value!r}: found", f"{name}={value!r}: must be"))
        for p in AdapterOptions.from_call(**given).problems()
    )


def test_values_of_the_right_type_pass() -> None:
    import torch

    assert not LoadOptions.from_call(
        "a/b", 64, torch.float32, False, token=True, device_map={"": "cpu"}, rope_scaling={"rope_type": "linear", "factor": 2.0},
        use_gradient_checkpointing="auto", revision="main", unsloth_tiled_mlp=64, memory_budget=2**33, cache_dir="x",
        local_files_only=True,
    ).problems()  # fmt: skip
    assert not AdapterOptions.from_call(
        r=8, target_modules={"q_proj"}, modules_to_save=("lm_head",), layers_to_transform=[0, 1], init_lora_weights="gaussian",
        rank_pattern={"q_proj": 4}, lora_dropout=0, loftq_config={},
    ).problems()  # fmt: skip


def test_names_of_other_libraries() -> None:
    with pytest.raises(OptionError, match=r"'rank'.*did you mean r\?"):
        AdapterOptions.from_call(rank=8).validate()


def test_settings_of_the_trainer(tmp_path: Any) -> None:
    from hasten.testing import tiny_model
    from hasten.training import sft_config

    model = tiny_model("llama")
    with pytest.raises(OptionError, match=r"(?s)packing='false': found str.*learning_rate='1e-4': found str"):
        sft_config(model, output_dir=str(tmp_path), packing="false", learning_rate="1e-4")
    assert sft_config(model, output_dir=str(tmp_path), lr_scheduler_type="cosine", report_to="none", logging_steps=1)
