"""Attaching an adapter: all of it, or an error that lists what does not fit and a model that was not touched."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hasten.errors import CheckpointError
from hasten.loading.adapter import attach
from hasten.patching import apply
from hasten.testing import save_tiny

IDS = torch.randint(6, 260, (2, 12), generator=torch.Generator().manual_seed(1))

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "dropout": ("llama", {"lora_dropout": 0.3}),
    "dora": ("qwen2", {"use_dora": True}),
    "bias": ("qwen2", {"bias": "lora_only"}),
    "bias on B": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "some layers": ("mistral", {"layers_to_transform": [1, 3], "rank_pattern": {"q_proj": 2}}),
    "trained copies": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied, trained": ("gemma2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, frozen": ("cohere", {}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "token rows": ("gemma2", {"trainable_token_indices": [5, 200]}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
}


def _base(folder: Path, model_type: str = "llama", **kwargs: Any) -> Any:
    if not folder.exists():
        save_tiny(folder, model_type, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kwargs)
    apply(model)
    return model


def _adapter(home: Path, kind: str = "plain") -> tuple[Any, Path]:
    """A PEFT model with trained-looking weights, and the folder that PEFT itself saved it to."""
    model_type, asked = KINDS[kind]
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **asked}
    model = get_peft_model(_base(home / "base", model_type), LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(home / "adapter")
    return model, home / "adapter"


def _state(model: Any) -> tuple[dict[str, torch.Tensor], list[tuple[str, type, bool]]]:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    return tensors, [(n, type(m), m.training) for n, m in model.named_modules()] + [("", bool, g) for g in grads]


def _untouched(model: Any, before: Any) -> None:
    tensors, facts = _state(model)
    assert facts == before[1]
    assert list(tensors) == list(before[0])
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert getattr(model, "peft_config", None) is None


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft.utils.save_and_load")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    model, folder = _adapter(tmp_path, kind)
    expected, plain = _logits(model), _logits(_base(tmp_path / "base"))
    assert (expected - plain).abs().max() > 1e-3
    again = attach(_base(tmp_path / "base"), folder)
    torch.testing.assert_close(_logits(again), expected, rtol=1e-5, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained


def test_the_callers_random_numbers_go_on(tmp_path: Path) -> None:
    _, folder = _adapter(tmp_path)
    model = _base(tmp_path / "base")
    state = torch.random.get_rng_state()
    attach(model, folder)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_frozen_when_not_trainable(tmp_path: Path) -> None:
    _, folder = _adapter(tmp_path, "trained copies")
    model = attach(_base(tmp_path / "base"), str(folder), trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_on_a_quantised_base(tmp_path: Path) -> None:
    model, folder = _adapter(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    again = attach(_base(tmp_path / "base", quantization_config=quantised), folder)
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
    assert torch.equal(again.get_parameter(name).cpu(), model.get_parameter(name))


def _rename(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    old = next(name for name in tensors if "layers.2.self_attn.q_proj.lora_A" in name)
    new = old.replace("model.layers", "language_model.layers")
    tensors[new] = tensors.pop(old)
    return [f"missing: {old}", f"unexpected: {new}"]


def _drop(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    names = [name for name in tensors if "layers.1" in name]
    for name in names:
        del tensors[name]
    return [f"missing: {name}" for name in names]


def _reshape(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    name = next(name for name in tensors if "down_proj.lora_A" in name)
    tensors[name] = torch.zeros(4, 96)
    return [f"wrong shape: {name} is [4, 96], the model needs [4, 128]"]


def _other_rank(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    config["r"] = 8
    return [f"wrong shape: {name}" for name in tensors]


def _base_weight(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    tensors["base_model.model.model.norm.weight"] = torch.zeros(64)
    return ["unexpected: base_model.model.model.norm.weight [64]"]


def _larger_vocabulary(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    name = "base_model.model.model.embed_tokens.weight"
    tensors[name] = torch.zeros(300, 64)
    return [f"wrong shape: {name} is [300, 64], the model needs [288, 64] (load the base with resize_model_vocab"]


def _no_target(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    config["target_modules"] = ["query_key_value"]
    return ["query_key_value"]


def _other_kind(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    for name in list(config):
        if name not in ("base_model_name_or_path", "task_type"):
            del config[name]
    config.update(peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    return ["PROMPT_TUNING"]


BROKEN = [_rename, _drop, _reshape, _other_rank, _base_weight, _larger_vocabulary, _no_target, _other_kind]


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda f: f.__name__.strip("_"))
def test_what_does_not_fit_is_listed_and_nothing_is_touched(tmp_path: Path, breaks: Any) -> None:
    _, folder = _adapter(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    complaints = breaks(tensors, config)
    assert complaints
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = _base(tmp_path / "base")
    before = _state(model)
    with pytest.raises(CheckpointError) as caught:
        attach(model, folder)
    for complaint in complaints:
        assert complaint in str(caught.value)
    _untouched(model, before)


def test_pickles_are_refused(tmp_path: Path) -> None:
    """A file that would run code on being unpickled."""
    _, folder = _adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    model = _base(tmp_path / "base")
    before = _state(model)
    with pytest.raises(CheckpointError, match="pickle"):
        attach(model, folder)
    _untouched(model, before)
    assert not (tmp_path / "ran").exists()


def test_missing_or_damaged_files(tmp_path: Path) -> None:
    _, folder = _adapter(tmp_path)
    model = _base(tmp_path / "base")
    before = _state(model)
    with pytest.raises(CheckpointError, match="no such/folder|is no folder"):
        attach(model, "no such/folder")
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    for damage in (data[:-100], data[:20], b"{}" * 40):
        weights.write_bytes(damage)
        with pytest.raises(CheckpointError, match="is damaged"):
            attach(model, folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        attach(model, folder)
    weights.write_bytes(data)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        attach(model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        attach(model, folder)
    _untouched(model, before)


@pytest.mark.filterwarnings(
    "ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning:peft.mapping_func"
)
def test_another_base_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = _adapter(tmp_path)
    with caplog.at_level(logging.WARNING, "hasten"):
        attach(_base(tmp_path / "base"), folder)
    assert "was trained on" not in caplog.text
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    with caplog.at_level(logging.WARNING, "hasten"):
        attach(_base(tmp_path / "copy"), folder)
    assert f"was trained on {tmp_path / 'base'} and is attached to {tmp_path / 'copy'}" in caplog.text


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    _, folder = _adapter(tmp_path)
    model = attach(_base(tmp_path / "base"), folder)
    with pytest.raises(CheckpointError, match="already has an adapter"):
        attach(model, folder)
