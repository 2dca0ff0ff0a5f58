"""Numbers and paths on the command line: what is no number of the kind is refused; brackets in a path are text."""

import os
from pathlib import Path
from typing import Any

import pytest
from cli_kit import refuse_models
from typer.testing import CliRunner

from hasten.cli import FAILED, app
from hasten.errors import OptionError
from hasten.estimation import estimate
from hasten.testing import save_tiny


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("home") / "[bold]tiny[/red] :boom:")


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf", "warm", "true", ""])
def test_a_temperature_is_a_finite_number_of_at_least_0(base: Path, value: str) -> None:
    done = call("generate", base, "hello", f"--temperature={value}", "--load", "16bit")
    assert done.exit_code == 2 and "temperature" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate", "--max-new-tokens"),
        ("generate", "--max-seq-length"),
        ("estimate", "--seq-len"),
        ("estimate", "--batch-size"),
        ("estimate", "--rank"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "2.5", "nan", "many"])
def test_counts_are_positive_integers(base: Path, command: str, option: str, value: str) -> None:
    done = call(command, base, *(["x"] if command == "generate" else []), f"{option}={value}", "--load", "16bit")
    assert done.exit_code == 2 and option in done.stderr


@pytest.mark.parametrize("value", ["-1", "0", "nan", "much", "5 apples"])
def test_a_budget_is_a_size(base: Path, value: str) -> None:
    assert call("estimate", base, f"--memory-budget={value}").exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", True),
        ("batch_size", "2"),
        ("seq_len", 2.0),
        ("rank", None),
        ("full_finetuning", "false"),
        ("offload_embedding", 0),
        ("checkpointing", 1),
        ("checkpointing", "false"),
        ("dtype", "bfloat16"),
        ("memory_budget", -1),
        ("quantization", True),
        ("optimizer", None),
    ],
)
def test_estimate_checks_the_type_of_every_argument(base: Path, name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        estimate(base, **{name: value})


def test_brackets_and_colons_in_a_path_are_printed_as_they_are(base: Path, tmp_path: Path) -> None:
    done = call("estimate", base, "--seq-len", 32, "--rank", 4)
    assert done.exit_code == 0, done.output
    said = "".join(done.stdout.split())
    assert "[bold]tiny[/red]:boom:" in said
    missing = call("estimate", tmp_path / "[/red] no[where] :boom:")
    assert missing.exit_code == FAILED and "[/red]no[where]:boom:" in "".join(missing.stderr.split())
    merged = call("merge", base, tmp_path / "[x] :boom:")
    assert "[/]" not in merged.stderr


@pytest.mark.parametrize("command", ["merge", "demo"])
def test_a_target_is_checked_before_anything_is_loaded(
    command: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_models(monkeypatch)
    file = tmp_path / "file"
    file.write_text("mine")
    mine = tmp_path / "out/merged"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    for target in (file, file / "below", mine if command == "merge" else tmp_path / "out"):
        done = call(*(["merge", base, target] if command == "merge" else ["demo", "--out", target]))
        assert done.exit_code == FAILED and "ExportError" in done.stderr, (target, done.output, done.exception)
    assert file.read_text() == (mine / "notes.txt").read_text() == "mine"


def test_merging_into_the_working_directory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    here = tmp_path / "here"
    here.mkdir()
    inode = here.stat().st_ino
    monkeypatch.chdir(here)
    for _ in range(2):  # the second replaces the first
        done = call("merge", tmp_path / "adapter", ".")
        assert done.exit_code == 0, done.output + done.stderr
        assert {"config.json", "model.safetensors", "hasten.json"} <= set(os.listdir(here))
        assert AutoModelForCausalLM.from_pretrained(here).config.hidden_size == 64
        assert sorted(os.listdir(tmp_path)) == ["adapter", "here"]
        assert here.stat().st_ino == inode, "a shell in the folder would no longer see it"
