"""`hasten merge` never writes the base model unchanged: a folder without an adapter, and an adapter that fits nothing, are errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import refuse_models
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hasten.cli.commands import FAILED, app
from hasten.testing.tiny import save_tiny


def merge(adapter: Path | str, out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["merge", str(adapter), str(out), *options])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base", num_hidden_layers=2)


def adapter(base: Path, config: Any) -> Path:
    folder = base.parent / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    model.save_pretrained(folder)
    return folder


def refused(done: Any, *words: str) -> None:
    text = " ".join(done.stderr.split())
    assert done.exit_code == FAILED, done.output
    for word in words:
        assert word in text


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit", "lora"])
def test_a_model_without_an_adapter(base: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_models(monkeypatch)
    refused(merge(base, tmp_path / "out", "--method", method), "ExportError", "has no adapter", "nothing to merge")
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_without_an_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a hub id, of which only loading shows what it is."""
    monkeypatch.setattr(Path, "is_dir", lambda path: False if path == base else path.exists() and not path.is_file())
    loaded = AutoModelForCausalLM.from_pretrained(base)
    # The hub, which tests cannot reach, would give this.
    monkeypatch.setattr("hasten.model.FastLanguageModel.from_pretrained", lambda *a, **k: (loaded, None))
    refused(merge(base, tmp_path / "out"), "ExportError", "has no adapter")
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_names_match_nothing(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    weights = folder / "adapter_model.safetensors"
    renamed = {name.replace("model.layers", "model.blocks"): value for name, value in load_file(weights).items()}
    save_file(renamed, weights)
    refused(merge(folder, tmp_path / "out"), "CheckpointError", "missing", "unexpected")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(merge(folder, tmp_path / "out"), "CheckpointError", "query")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_method(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    refused(merge(folder, tmp_path / "out"), "PROMPT_TUNING")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert merge(folder, tmp_path / "out").exit_code == 0
    merged, before = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (tmp_path / "out", base))
    changed = {name for name in before if not torch.equal(merged[name], before[name].to(merged[name].dtype))}
    assert changed == {f"model.layers.{number}.self_attn.q_proj.weight" for number in (0, 1)}
