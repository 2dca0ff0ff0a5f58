"""Code written for unsloth runs unchanged: every example of tests/seeds, against local checkpoints of those names."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import HastenError, InputError, OptionError
from hasten.testing import save_tiny
from hasten.unsloth_compat import DropInError, install_as_unsloth, run

SEEDS = Path(__file__).parent / "seeds"
CHECKPOINTS = {
    "unsloth/Llama-3.2-1B-Instruct": "llama",
    "meta-llama/Llama-3.2-1B": "llama",
    "CohereForAI/c4ai-command-r-v01": "cohere",
    "CohereForAI/c4ai-command-r-plus": "cohere",
    "google/gemma-7b": "gemma",
}
HIDDEN, MLP, KEYS, LAYERS, VOCABULARY, RANK = 64, 128, 32, 4, 288, 16
ATTENTION_LORA = 2 * RANK * (HIDDEN + HIDDEN) + 2 * RANK * (HIDDEN + KEYS)  # q and o; k and v
LORA = LAYERS * (ATTENTION_LORA + 3 * RANK * (HIDDEN + MLP))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the examples' model names are checkpoint folders."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model_type in CHECKPOINTS.items():
        save_tiny(root / name, model_type)
    return root


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undoes an installation, so that the tests' own process stays as it was."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    yield
    sys.modules.pop("unsloth", None)


@pytest.fixture
def ran(folder: Path, uninstalled: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs an example in this process and returns its global names."""
    monkeypatch.chdir(folder)
    return lambda name: run(SEEDS / f"{name}.py")


def hasten_run(script: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`hasten run script arguments` in a process of its own, without a network."""
    code = """
import socket
def refuse(*args): raise AssertionError("a socket was opened")
socket.socket.connect = refuse
from hasten.cli import app
app()
"""
    command = [sys.executable, "-c", code, "run", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


NAMES = sorted(path.stem for path in SEEDS.glob("*.py") if path.stem != "vllm")


@pytest.mark.parametrize(
    "name", [name if name == "qlora" else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_every_example_runs_unchanged(name: str, folder: Path) -> None:
    done = hasten_run(SEEDS / f"{name}.py", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (f"Trainable parameters: {LORA:,}" if name == "qlora" else "")


def test_the_vllm_example_ends_in_one_error_that_says_when(folder: Path, ran: Any) -> None:
    done = hasten_run(SEEDS / "vllm.py", folder)
    assert done.returncode != 0
    with pytest.raises(OptionError, match="fast_inference=True is planned for a later version") as raised:
        ran("vllm")
    assert len(raised.value.problems) == 1
    assert "fast_inference=True" in done.stderr


def test_qlora_example_gives_a_4bit_llama_with_lora(ran: Any) -> None:
    model = ran("qlora")["model"]
    report = str(hasten.report(model))
    assert "gate_proj (nf4)" in report and "LlamaAttention" in report and "attention overlay" in report
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert model.peft_config["default"].r == RANK


def test_cohere_example_has_coheres_own_config(ran: Any) -> None:
    report = str(hasten.report(ran("cohere_finetune")["model"]))
    assert "CohereAttention" in report and "cohere family" in report and "o_proj (nf4)" in report


def test_gemma_example_is_a_gemma(ran: Any) -> None:
    model = ran("gemma_import")["model"]
    assert model.config.model_type == "gemma" and "gemma family" in str(hasten.report(model))


def test_full_finetuning_example_trains_every_weight_in_16_bits(ran: Any) -> None:
    model = ran("full_finetuning")["model"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_embeddings_example_trains_embedding_and_head_fully(ran: Any) -> None:
    model = ran("train_embeddings")["model"]
    assert model.num_parameters(only_trainable=True) == LORA + 2 * VOCABULARY * HIDDEN
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert len(trained) == 2 and any("embed_tokens" in n for n in trained) and any("lm_head" in n for n in trained)


def test_names_are_hastens_own(uninstalled: None) -> None:
    unsloth = install_as_unsloth()
    from unsloth import FastCohereModel, FastLanguageModel, is_bfloat16_supported

    assert FastLanguageModel is hasten.FastLanguageModel and FastCohereModel is hasten.FastCohereModel
    assert unsloth.__version__ == hasten.__version__
    assert is_bfloat16_supported() is (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
    for name in hasten.__all__:
        assert name.startswith("Fast") == (name in unsloth.__all__), name


def test_installing_twice_is_installing_once(uninstalled: None) -> None:
    first, finders = install_as_unsloth(), len(sys.meta_path)
    assert install_as_unsloth() is first and sys.modules["unsloth"] is first
    assert len(sys.meta_path) == finders


def test_the_real_one_is_not_replaced(uninstalled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(sys)("unsloth")
    monkeypatch.setitem(sys.modules, "unsloth", real)
    with pytest.raises(DropInError, match="already imported"):
        install_as_unsloth()
    assert sys.modules["unsloth"] is real


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("import unsloth.chat_templates", "tokenizer.apply_chat_template"),
        ("from unsloth.chat_templates import get_chat_template", "assistant_only_loss"),
        ("from unsloth import PatchDPOTrainer", "TRL's own DPOTrainer"),
        ("from unsloth.models.llama import FastLlamaModel", "from unsloth import FastLlamaModel"),
        ("from unsloth import something", "It has FastCohere2Model"),
    ],
)
def test_what_is_not_there_names_what_is(statement: str, message: str, uninstalled: None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(statement)
    with pytest.raises(ImportError, match=message) as raised:
        run(script)
    assert isinstance(raised.value, HastenError)


def test_asking_whether_a_name_is_there_is_no_error(uninstalled: None) -> None:
    assert not hasattr(install_as_unsloth(), "something")


def test_scripts_see_their_arguments_folder_and_name(uninstalled: None, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("value = 7")
    script = tmp_path / "script.py"
    script.write_text("import sys, neighbour\nseen = (__name__, sys.argv, neighbour.value)\n")
    before = (sys.argv, sys.path)
    assert run(script, ["--steps", "3"])["seen"] == ("__main__", [str(script), "--steps", "3"], 7)
    assert (sys.argv, sys.path) == before
    with pytest.raises(InputError, match=r"nothing\.py"):
        run(tmp_path / "nothing.py")
