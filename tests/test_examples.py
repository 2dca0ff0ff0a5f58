"""The examples run as they are, on a CPU, against a checkpoint folder given as their first argument."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.testing import save_tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"-?\d+\.?\d*(?:e[-+]\d+)?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), amplify=1.0)


@pytest.fixture
def example(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs one example as `python example.py checkpoint output` and returns what it printed."""

    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(checkpoint), str(tmp_path)])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def before_and_after(printed: str, label: str) -> tuple[float, float]:
    found = re.search(rf"{label}: ({NUMBER}) -> ({NUMBER})", printed)
    assert found, printed
    return float(found[1]), float(found[2])


def value(printed: str, label: str) -> float:
    found = re.search(rf"{label}: ({NUMBER})", printed)
    assert found, printed
    return float(found[1])


def test_qlora_sft(example: Callable[[str], str], tmp_path: Path) -> None:
    printed = example("qlora_sft")
    first, last = before_and_after(printed, "loss")
    assert last < first - 0.3
    assert "gate_proj (nf4)" in printed and "200 examples, " in printed
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()


def test_memory_budget(example: Callable[[str], str]) -> None:
    printed = example("memory_budget")
    first, last = before_and_after(printed, "loss")
    assert last < first - 0.3
    assert re.search(r"a step will take about [1-9]\d* MiB: \d+ of \d+ layers", printed)
    assert re.search(r"memory: 4 of 4 layers save all activations \(predicted peak \d+\.\d [MG]iB", printed)


def test_full_finetune(example: Callable[[str], str], tmp_path: Path, checkpoint: Path) -> None:
    printed = example("full_finetune")
    first, last = before_and_after(printed, "loss")
    assert last < first - 1.0
    trained, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, checkpoint))
    assert f"{base.num_parameters():,} of {base.num_parameters():,} parameters train" in printed
    changed = [not torch.equal(p.float(), q) for p, q in zip(trained.parameters(), base.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_train_embeddings(example: Callable[[str], str]) -> None:
    printed = example("train_embeddings")
    first, last = before_and_after(printed, "loss")
    assert last < first - 0.3
    assert value(printed, "largest difference of logits after reloading") == 0.0


def test_dpo(example: Callable[[str], str], tmp_path: Path) -> None:
    first, last = before_and_after(example("dpo"), "margin of the chosen answer")
    assert first == 0.0 and last > 0.3
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_grpo(example: Callable[[str], str], tmp_path: Path) -> None:
    first, last = before_and_after(example("grpo"), "reward")
    assert first < 0.3 and last > 0.6
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_generate_batch(example: Callable[[str], str]) -> None:
    printed = example("generate_batch")
    for prompt in ("Once upon a time", "A haiku about rain, please:", "2 + 2 ="):
        assert f"'{prompt}' -> " in printed
    assert "6 samples" in printed
    assert printed.rstrip("\n").count("Once upon a time") == 2, "once in the batch, once streamed"


def test_merge_and_reload(example: Callable[[str], str]) -> None:
    printed = example("merge_and_reload")
    assert value(printed, "relative difference of logits") <= 2e-5
    assert "model.safetensors" in printed and "tokenizer.json" in printed


def test_every_example_is_tested_and_short() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tests, f"{path.name} has no test"
        assert len(path.read_text().splitlines()) < 80, path.name
