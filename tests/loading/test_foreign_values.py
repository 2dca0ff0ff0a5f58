"""Foreign files with one wrong value: which file and field is named, before a model is built."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import poison
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hasten.errors import CheckpointError, HastenError, OptionError, TokenizerError
from hasten.loading import load
from hasten.loading.adapter import attach
from hasten.loading.config_rules import config_problems
from hasten.loading.shards import read_checkpoint
from hasten.loading.template import template_notes
from hasten.options import LoadOptions
from hasten.testing import save_tiny, tiny_model, tiny_tokenizer

Copy = Callable[[Path], Path]


def refusal(kind: type[HastenError], folder: Path, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        load(LoadOptions.from_call(model_name=str(folder), **{"max_seq_length": 64, **arguments}))
    return str(caught.value)


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


CONFIG = [
    ("num_hidden_layers", 10**6, "the checkpoint has 39 tensors"),
    ("num_hidden_layers", 3, "model.layers.3.input_layernorm.weight is in"),
    ("num_hidden_layers", 5, "model.layers.4.input_layernorm.weight (64,) is missing"),
    ("num_hidden_layers", -1, "must be a positive integer"),
    ("num_hidden_layers", "4", "(text)"),
    ("max_position_embeddings", -1, "must be a positive integer"),
    ("max_position_embeddings", 0, "must be a positive integer"),
    ("max_position_embeddings", 10**18, "must be a positive integer"),
    ("hidden_size", 128, "is (288, 64)"),
    ("hidden_size", 10**9, "no tensor of the checkpoint is that large"),
    ("vocab_size", 300, "the largest dimension is 288"),
    ("vocab_size", 270, "the model's is (270, 64)"),
    ("vocab_size", 2**40, "must be a positive integer"),
    ("num_attention_heads", 0, "must be a positive integer"),
    ("num_attention_heads", 2.5, "must be a positive integer"),
    ("num_key_value_heads", 0, "must be a positive integer"),
    ("head_dim", 0, "must be a positive integer"),
    ("head_dim", 8, "self_attn.q_proj.weight is (64, 64)"),
    ("intermediate_size", -5, "must be a finite number"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps is NaN"),
    ("rms_norm_eps", -1e-5, "must be a finite number from 0"),
    ("rms_norm_eps", "1e-5", "(text)"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_parameters.rope_theta=0"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": -1e4}, "rope_parameters.rope_theta"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": -2}, "rope_parameters.factor=-2"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": {"__float__": "NaN"}}, "factor is NaN"),
    ("sliding_window", -4, "sliding_window=-4"),
    ("attention_dropout", 1.5, "from 0 and at most 1"),
    ("attention_dropout", "0.1", "(text)"),
    ("tie_word_embeddings", "false", "must be true or false"),
    ("dtype", "load", "must be a floating dtype"),
    ("dtype", "int8", "must be a floating dtype"),
    ("eos_token_id", 2.5, "must be a token id"),
    ("eos_token_id", [2, "3"], "must be a token id"),
    ("pad_token_id", 10**6, "config.json"),
    ("quantization_config", "nf4", "must be an object"),
    ("_attn_implementation", "someone/kernels", "the name of an attention backend"),
    ("to_dict", 1, "is the name of a method"),
    ("__class__", {}, "is the name of a method"),
    ("anything", 10**30, "must fit 64 bits"),
    ("hidden_act", "nope", "transformers cannot build"),
    ("model_type", 5, "config.json"),
]


@pytest.mark.parametrize(("field", "value", "said"), CONFIG)
def test_a_wrong_value_of_the_config(llama: Path, copy_of: Copy, field: str, value: Any, said: str) -> None:
    folder = poison(copy_of(llama))
    change(folder / "config.json", **{field: value})
    started = time.monotonic()
    assert said in refusal(HastenError, folder)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("[]", "a list, and must hold an object"),
        ('"llama"', "text, and must hold an object"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than"),
        ('{"a": ' + "[" * 80 + "]" * 80 + "}", "nested more than"),
        ('{"a": NaN}', "a is NaN"),
        ('{"a": {"b": [0, 1e999]}}', "a.b[1] is infinite"),
        ('{"a": Infinity}', "a is infinite"),
        ('{"a": ' + "9" * 5000 + "}", "not readable as JSON"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ('{"a": 1', "not readable as JSON"),
        (b"\xef\xbb\xbf{}", "not readable as JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "' + b"x" * (5 * 2**20) + b'"}', "bytes; at most"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_is_no_sound_json(llama: Path, copy_of: Copy, name: str, text: str | bytes, said: str) -> None:
    folder = copy_of(llama)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if name == "tokenizer_config.json" and "at most" in said:
        return  # a file of added tokens may be larger
    kind = TokenizerError if name.startswith("tokenizer") else CheckpointError
    message = refusal(kind, folder)
    assert said in message and name in message


def test_a_config_that_is_a_pipe_does_not_hang(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    (folder / "generation_config.json").unlink()
    os.mkfifo(folder / "generation_config.json")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "no config.json" in refusal(CheckpointError, folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", "2"),
        ("eos_token_id", {"a": 1}),
        ("max_new_tokens", "many"),
        ("temperature", -1),
        ("top_p", 2),
        ("do_sample", "false"),
        ("num_beams", 0),
        ("repetition_penalty", 0),
    ],
)
def test_a_wrong_value_of_the_generation_config(llama: Path, copy_of: Copy, field: str, value: Any) -> None:
    folder = copy_of(llama)
    change(folder / "generation_config.json", **{field: value})
    message = refusal(CheckpointError, folder)
    assert "generation_config.json" in message and field in message


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("tokenizer_config.json", "pad_token", 5),
        ("tokenizer_config.json", "eos_token", ["x"]),
        ("tokenizer_config.json", "padding_side", "middle"),
        ("tokenizer_config.json", "model_max_length", "long"),
        ("tokenizer_config.json", "model_max_length", -1),
        ("tokenizer_config.json", "chat_template", 7),
        ("tokenizer_config.json", "chat_template", [{"name": "x"}]),
        ("tokenizer_config.json", "tokenizer_class", 3),
        ("tokenizer_config.json", "add_bos_token", "false"),
        ("tokenizer_config.json", "added_tokens_decoder", {"-3": {"content": "x"}}),
        ("special_tokens_map.json", "unk_token", 1.5),
        ("added_tokens.json", "<x>", -1),
        ("added_tokens.json", "<x>", "7"),
        ("added_tokens.json", "<x>", 10**9),
        ("tokenizer.json", "model", None),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        ("tokenizer.json", "added_tokens", [{"id": 10**9, "content": "x"}]),
        ("tokenizer.json", "added_tokens", ["x"]),
        ("tokenizer.json", "added_tokens", 0.3),
        ("tokenizer.json", "added_tokens", {"id": 3}),
        ("tokenizer.json", "pre_tokenizer", {"type": "Nope"}),
        ("tokenizer.json", "version", 4),
    ],
)
def test_a_wrong_value_of_a_tokenizer_file(llama: Path, copy_of: Copy, name: str, field: str, value: Any) -> None:
    folder = copy_of(llama)
    change(folder / name, **{field: value})
    message = refusal(TokenizerError, folder)
    assert (name in message and field in message) or "The tokenizer in" in message


def test_an_id_without_a_token_does_not_grow_the_model(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    last = max(content["model"]["vocab"], key=lambda token: content["model"]["vocab"][token])
    content["model"]["vocab"][last] = 10**6
    path.write_text(json.dumps(content))
    assert "ids up to 1000000" in refusal(TokenizerError, folder)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"x" * (3 * 2**20)])
def test_a_template_that_is_no_text_or_too_long(llama: Path, copy_of: Copy, raw: bytes) -> None:
    folder = copy_of(llama)
    (folder / "chat_template.jinja").write_bytes(raw)
    assert "chat_template.jinja" in refusal(TokenizerError, folder)


ADAPTER = [
    ("r", "8"), ("r", 0), ("r", -4), ("r", 4.0), ("r", True), ("r", 10**9), ("lora_alpha", -1), ("lora_alpha", "16"),
    ("lora_alpha", None), ("lora_dropout", 1.5), ("lora_dropout", -0.1), ("target_modules", 3), ("target_modules", [1]),
    ("target_modules", "("), ("target_modules", "nothing"), ("modules_to_save", "lm_head("), ("bias", "some"),
    ("use_dora", "false"), ("use_rslora", 1), ("rank_pattern", []), ("rank_pattern", {"q_proj": "4"}),
    ("alpha_pattern", {"q_proj": -1}), ("layers_to_transform", "all"), ("peft_type", "NOPE"), ("peft_type", 4),
    ("init_lora_weights", "nope"), ("init_lora_weights", 5), ("loftq_config", "x"), ("task_type", 3), ("revision", 1),
    ("alora_invocation_tokens", 0.3), ("alora_invocation_tokens", ["a"]), ("trainable_token_indices", {"q_proj": "b"}),
    ("layer_replication", "x"), ("target_parameters", [1]), ("use_qalora", "yes"), ("megatron_core", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("lora")
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("field", "value"), ADAPTER)
def test_a_wrong_value_of_an_adapter(adapter: Path, copy_of: Copy, field: str, value: Any) -> None:
    folder = copy_of(adapter)
    change(folder / "adapter_config.json", **{field: value})
    if field == "lora_alpha" and value is None:
        change(folder / "adapter_config.json", lora_alpha=float("nan"))
    with pytest.raises(CheckpointError, match="adapter"):
        attach(tiny_model("llama"), folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None])
def test_weights_of_an_adapter_that_are_no_numbers(adapter: Path, copy_of: Copy, value: float | None) -> None:
    folder = copy_of(adapter)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if value is None:
        tensors[name] = torch.ones_like(tensors[name], dtype=torch.int32)
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name):
        attach(tiny_model("llama"), folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, None])
@pytest.mark.parametrize("how", [{"load_in_4bit": True}, {"load_in_4bit": False}, {"load_in_8bit": True}])
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, value: float | None, how: dict[str, Any]) -> None:
    folder = save_tiny(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if value is None:
        tensors[name] = tensors[name].to(torch.int32)
        said = "is I32 in model.safetensors, the model's is a float"
    else:
        if value == 1e39:
            tensors[name] = tensors[name].double()
        tensors[name].view(-1)[1] = value
        said = f"1 values of 1 tensor are NaN or infinite ({name}: 1)"
    save_file(tensors, path, metadata={"format": "pt"})
    message = refusal(CheckpointError, folder, dtype=torch.float32, **how)
    assert said in message and name in message


def test_values_that_overflow_fp16_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "loaded as float16" in refusal(CheckpointError, folder, load_in_4bit=False, dtype=torch.float16)
    load(LoadOptions(str(folder), max_seq_length=64, load_in_4bit=False, dtype=torch.float32))


def test_tensors_that_the_model_does_not_use_are_reported(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    notes = load(LoadOptions(str(folder), max_seq_length=64)).notes
    assert (
        "weights: 1 tensors of the checkpoint are not used by the model: model.layers.0.self_attn.q_proj.bias" in notes
    )


def test_layers_of_multi_token_prediction_are_not_surplus(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(64, 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.4.eh_proj.weight" in refusal(CheckpointError, folder)
    change(folder / "config.json", num_nextn_predict_layers=1)
    load(LoadOptions(str(folder), max_seq_length=64))


def test_the_rules_take_every_config_that_transformers_ships() -> None:
    """The default config of each causal LM is a valid one."""
    looked = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(model_type)
        except Exception as error:  # noqa: BLE001 a type that needs arguments or a package
            print(model_type, error)
            continue
        for only_changes in (True, False):
            assert config_problems(json.loads(config.to_json_string(use_diff=only_changes)), {}) == [], model_type
        looked += 1
    assert looked > 150


def test_infinity_is_no_limit_of_mambas_time_steps(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size"', '"time_step_limit": [0.0, Infinity], "vocab_size"'))
    load(LoadOptions(str(folder), max_seq_length=64))


HOSTILE = {
    "a long loop": "{% for a in range(90000) %}{% for b in range(90000) %}{{ a * b }}{% endfor %}{% endfor %}",
    "a large constant": "{{ 10 ** (10 ** 10) }}",
    "a large text": "{% set x = 'x' * 10 ** 10 %}{{ x }}",
    "a text that grows": "{% set ns = namespace(x='x' * 1000) %}{% for i in range(90000) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "an endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep nesting": "{% if true %}" * 5000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_ends(kind: str) -> None:
    started = time.monotonic()
    (note,) = template_notes(tiny_tokenizer(HOSTILE[kind]), seconds=1)
    assert note.startswith("chat template: cannot render") and time.monotonic() - started < 30


def test_a_template_of_a_checkpoint_that_cannot_be_rendered_is_noted(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    (folder / "chat_template.jinja").write_text(HOSTILE["an endless macro"])
    notes = load(LoadOptions(str(folder), max_seq_length=64)).notes
    assert any(note.startswith("chat template: cannot render") for note in notes)


def test_a_template_with_everything_that_published_ones_use_renders() -> None:
    template = (
        "{%- set ns = namespace(first=true) -%}{{ bos_token }}{{ strftime_now('%Y') }}{{ {'a': 1} | tojson(indent=2) }}"
        "{% for message in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
        "{% generation %}{{ messages[0]['content'].strip() }}{% endgeneration %}"
        "{% if tools is defined and tools %}x{% endif %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert template_notes(tiny_tokenizer(template)) == []


@pytest.mark.parametrize(
    "field", [{"max_position_embeddings": -1}, {"num_hidden_layers": 10**6}, {"rms_norm_eps": float("nan")}]
)
def test_fields_of_the_config_among_the_arguments_are_checked_alike(llama: Path, field: dict[str, Any]) -> None:
    assert f"{next(iter(field))}=" in refusal(OptionError, llama, **field)


def test_a_callers_own_config_without_positions(llama: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    config.max_position_embeddings = -1
    assert "max_position_embeddings=-1" in refusal(OptionError, llama, config=config)


def test_brackets_in_a_folders_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "[bold]x[/] {y} %s")
    assert load(LoadOptions(str(folder), max_seq_length=64)).model.config.name_or_path == str(folder)


def test_headers_are_compared_with_the_config_before_anything_is_built(
    llama: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(llama)
    change(folder / "config.json", num_hidden_layers=10**6)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("a model was built"))
    assert "num_hidden_layers=1000000" in refusal(CheckpointError, folder)
    assert len(read_checkpoint(folder)) == 39
