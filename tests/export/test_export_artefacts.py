"""NF4, the adapter alone, the hub: each is read by plain transformers and PEFT, offline, wherever it is moved to."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from export_kit import NF4, adapt, base_folder, close, config, contents, fresh_logits, load, logits, tensors
from peft import LoraConfig, PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.errors import ExportError
from hasten.export import push_to_hub_merged, save_merged
from hasten.testing import tiny_tokenizer
from hasten.weights import dequantize
from hasten.weights.formats import format_of


@torch.no_grad()
def _train_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """In training mode bitsandbytes' CPU path computes in the dtype that was asked for."""
    return model.train()(ids).logits.float()


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_four_bit_is_the_16_bit_merge_requantised(tmp_path: Path, model_type: str) -> None:
    base = base_folder(tmp_path / "base", model_type)
    model = adapt(load(base, NF4))
    rows = torch.randint(6, 260, (3, 24))
    done = save_merged(model, tmp_path / "nf4", save_method="merged_4bit", max_shard_size="40KB", rows=rows)
    save_merged(model, tmp_path / "full")
    tensors(tmp_path / "nf4")
    assert config(tmp_path / "nf4")["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert done.method == "merged_4bit"
    assert done.bytes < 0.6 * sum(t.numel() * t.element_size() for t in tensors(tmp_path / "full").values())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", attn_implementation="eager")
    full = load(tmp_path / "full")
    for name, module in full.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = small.get_submodule(name)
            assert format_of(packed).name == "nf4"
            expected = bnb.functional.dequantize_4bit(
                *bnb.functional.quantize_4bit(module.weight.detach(), quant_type="nf4", compress_statistics=True)
            )
            assert torch.equal(dequantize(packed, torch.float32), expected)
    p, q = F.log_softmax(_train_logits(full, rows), -1), F.log_softmax(_train_logits(small, rows), -1)
    measured = (p.exp() * (p - q)).sum(-1).mean().item()
    assert done.kl == pytest.approx(measured, rel=1e-3)
    assert done.kl > 1e-4


def test_four_bit_measures_on_rows_of_its_own_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapt(load(base_folder(tmp_path / "base")))
    with caplog.at_level(logging.INFO, "hasten"):
        first = save_merged(model, tmp_path / "one", save_method="merged_4bit")
    assert "KL to 16-bit" in caplog.text
    assert save_merged(model, tmp_path / "two", save_method="merged_4bit").kl == first.kl
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert first.kl is not None
    assert first.kl > 0


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "dora": ("qwen2", {"use_dora": True}),
    "trained copies": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": ("gemma2", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "token rows": ("gemma2", {"trainable_token_indices": [5, 200]}),
}


def test_adapter_loads_with_peft_alone(tmp_path: Path) -> None:
    """Each kind in one fresh process, from relative paths; then the base's recorded name is the base."""
    expected, pairs = [], []
    for number, (model_type, asked) in enumerate(ADAPTERS.values()):
        base = base_folder(tmp_path / str(number) / "base", model_type)
        model = adapt(load(base), **asked)
        expected.append(logits(model))
        save_merged(model, tmp_path / str(number) / "lora", tiny_tokenizer(), save_method="lora")
        pairs.append((f"{number}/base", f"{number}/lora"))
        recorded = json.loads((tmp_path / str(number) / "lora" / "adapter_config.json").read_text())
        assert recorded["base_model_name_or_path"] == str(base)
        assert recorded["inference_mode"] is True
    for got, want in zip(fresh_logits(pairs, tmp_path, cwd=tmp_path), expected, strict=True):
        close(got, want)


def test_adapter_records_the_revision_and_only_the_active_one_is_written(tmp_path: Path) -> None:
    model = adapt(load(base_folder(tmp_path / "base")), target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    model.base_model.model.config._commit_hash = "a" * 40
    save_merged(model, tmp_path / "out", save_method="lora")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] == "a" * 40
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    close(logits(again), logits(model))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ExportError, match="2 active adapters"):
        save_merged(model, tmp_path / "both", save_method="lora")
    with pytest.raises(ExportError, match="has no adapter"):
        save_merged(load(tmp_path / "base"), tmp_path / "none", save_method="lora")


def test_adapter_of_a_grown_vocabulary_carries_the_rows(tmp_path: Path) -> None:
    from hasten.loading.adapter import attach

    model = load(base_folder(tmp_path / "base"))
    model.resize_token_embeddings(300, mean_resizing=False)
    model = adapt(model, target_modules=["q_proj"])
    save_merged(model, tmp_path / "out", save_method="lora")
    base = load(tmp_path / "base")
    base.resize_token_embeddings(300, mean_resizing=False)
    ids = torch.tensor([[3, 290, 299, 8]])
    close(logits(attach(base, tmp_path / "out"), ids), logits(model, ids))


def test_artefacts_are_safe_and_stand_alone(tmp_path: Path) -> None:
    """Moved, renamed, opened by a relative path without the base; no pickle; no base's path in a merged one."""
    model = adapt(load(base_folder(tmp_path / "base"), NF4))
    for method in ("merged_16bit", "merged_4bit", "lora"):
        save_merged(model, tmp_path / "out" / method, tiny_tokenizer(), save_method=method)
    names = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in names} <= {".json", ".safetensors", ".jinja"}
    for method in ("merged_16bit", "merged_4bit"):
        assert not [
            p for p in (tmp_path / "out" / method).iterdir() if str(tmp_path / "base").encode() in p.read_bytes()
        ]
    shutil.move(tmp_path / "out" / "merged_16bit", tmp_path / "moved")
    shutil.rmtree(tmp_path / "base")
    (got,) = fresh_logits([Path("moved")], tmp_path, cwd=tmp_path)
    close(logits(load(tmp_path / "moved")), got)
    assert AutoTokenizer.from_pretrained(tmp_path / "moved").encode("hi") == tiny_tokenizer().encode("hi")


class _Hub:
    """Stands in for HfApi: keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **kwargs}))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id: str, **kwargs: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **kwargs}))

    def upload_folder(self, folder_path: Path, **kwargs: Any) -> str:
        self.calls.append(("upload_folder", kwargs))
        self.files = contents(Path(folder_path))
        return "commit"


def test_push_sends_what_save_writes(tmp_path: Path) -> None:
    model = adapt(load(base_folder(tmp_path / "base")))
    save_merged(model, tmp_path / "out", tiny_tokenizer(), max_shard_size="90KB")
    hub: Any = _Hub()
    done = push_to_hub_merged(
        model, "mine", tiny_tokenizer(), private=True, revision="v2", api=hub, max_shard_size="90KB"
    )
    assert done == "commit"
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "mine", "private": True, "exist_ok": True}
    assert hub.calls[1][1] == {"repo_id": "me/mine", "branch": "v2", "exist_ok": True}
    assert hub.calls[2][1]["revision"] == "v2"
    assert hub.calls[2][1]["ignore_patterns"] == ["hasten.json"]
    assert hub.files == contents(tmp_path / "out")


def test_push_that_cannot_be_written_sends_nothing(tmp_path: Path) -> None:
    hub: Any = _Hub()
    with pytest.raises(ExportError, match="did you mean"):
        push_to_hub_merged(adapt(load(base_folder(tmp_path / "base"))), "mine", save_method="merged_8bit", api=hub)
    assert hub.calls == []


def test_push_asks_the_hub_that_the_environment_names(tmp_path: Path) -> None:
    """A loopback port where nothing listens: the real client is used, and its own error comes through."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from export_kit import adapt, load\n"
        "from hasten.export import push_to_hub_merged\n"
        "push_to_hub_merged(adapt(load(Path(sys.argv[2]))), 'me/mine', token='hf_x')\n"
    )
    base = base_folder(tmp_path / "base")
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(base)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "127.0.0.1" in done.stderr or "Connection" in done.stderr
    assert "Error" in done.stderr.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
