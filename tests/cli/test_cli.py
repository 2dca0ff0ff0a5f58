"""The commands themselves: what they print, how they end."""

import sys
from pathlib import Path
from typing import Any

import pytest
from cli_kit import write_job
from typer.testing import CliRunner

import hasten
from hasten.cli import FAILED, app
from hasten.errors import CheckpointError, OptionError
from hasten.testing import save_tiny


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `hasten train` has run."""
    folder = tmp_path_factory.mktemp("trained")
    done = call("train", write_job(folder))
    assert done.exit_code == 0, done.output
    assert "4 steps, mean loss" in done.output and "step 4/4" in done.output
    return folder


def test_help_names_every_command() -> None:
    text = call("--help").output
    for command in ("demo", "train", "generate", "serve", "merge", "report", "estimate", "doctor", "run"):
        assert command in text


def test_version() -> None:
    done = call("--version")
    assert done.exit_code == 0 and done.stdout.strip() == f"hasten {hasten.__version__}"


def test_an_unknown_choice_names_the_known_ones(tmp_path: Path) -> None:
    for arguments, known in (
        (("estimate", tmp_path, "--load", "5bit"), "4bit, 8bit, 16bit"),
        (("merge", tmp_path, tmp_path, "--method", "merged"), "merged_16bit, merged_4bit, lora"),
    ):
        done = call(*arguments)
        said = " ".join(word for word in done.stderr.replace("│", " ").split())
        assert done.exit_code == 2 and known in said


def test_errors_are_a_message_and_an_exit_code(tmp_path: Path) -> None:
    path = write_job(tmp_path, train={"learning_rat": 1})
    done = call("train", path)
    assert done.exit_code == FAILED == 2
    assert "learning_rate" in done.stderr and "OptionError" in done.stderr
    assert "Traceback" not in done.output + done.stderr and not done.stdout
    shown = call("--debug", "train", path)
    assert isinstance(shown.exception, OptionError)


def test_train_refuses_a_foreign_folder_before_training(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    done = call("train", write_job(tmp_path, save={"folder": "mine"}))
    assert done.exit_code == FAILED and "ExportError" in done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "mine/notes.txt").exists()


def test_generate_streams_answers(trained: Path) -> None:
    done = call("generate", trained / "out/model", "question 1", "question 2", "--max-new-tokens", 5, "--load", "16bit")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    too_long = call("generate", trained / "base", "x" * 30, "--max-seq-length", 20, "--load", "16bit")
    assert too_long.exit_code == FAILED and "max_seq_length=20" in " ".join(too_long.stderr.split())


def test_merge_writes_a_checkpoint_for_plain_transformers(trained: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = call("merge", trained / "out/model", trained / "merged")
    assert done.exit_code == 0, done.stderr
    assert "merged_16bit" in done.stdout
    merged, info = AutoModelForCausalLM.from_pretrained(trained / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(merged).__module__.startswith("transformers.")


def test_merge_refuses_to_write_over_what_is_not_its_own(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = call("merge", trained / "out/model", tmp_path)
    assert done.exit_code == FAILED and (tmp_path / "mine.txt").read_text() == "keep"


def test_report_shows_overlays_and_adapters(trained: Path) -> None:
    done = call("report", trained / "out/model", "--load", "16bit")
    assert done.exit_code == 0, done.stderr
    for word in ("LlamaAttention", "overlay", "q_proj", "LoRA"):
        assert word in done.stdout


def test_a_strict_report_fails_where_a_module_is_stock(trained: Path, tmp_path: Path) -> None:
    assert call("report", trained / "out/model", "--load", "16bit", "--strict").exit_code == 0
    done = call("report", save_tiny(tmp_path / "moe", "mixtral"), "--load", "16bit", "--strict")
    assert done.exit_code == FAILED and "MixtralForCausalLM" in done.stdout
    assert "PatchError: not every module runs fused" in done.stderr and "stock" in done.stderr


def test_estimate_prints_the_parts_and_their_sum(trained: Path) -> None:
    done = call("estimate", trained / "base", "--seq-len", 32, "--rank", 4)
    assert done.exit_code == 0, done.stderr
    assert "saved activations" in done.stdout and "total" in done.stdout and "plan:" in done.stdout
    missing = call("estimate", trained)
    assert missing.exit_code == FAILED and CheckpointError.__name__ in missing.stderr


def test_doctor_ends_with_one_on_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from hasten import doctor

    healthy = replace(doctor.look(), driver=False)
    monkeypatch.setattr(doctor, "look", lambda: healthy)  # what the doctor finds on a machine
    assert call("doctor").exit_code == 0
    monkeypatch.setattr(doctor, "look", lambda: replace(healthy, free_disk_gib=0.1))
    done = call("doctor")
    assert done.exit_code == 1 and "0.1 GiB free" in done.stdout and "1 problem" in done.stderr


def test_run_hands_a_script_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    script, out = tmp_path / "s.py", tmp_path / "o.txt"
    script.write_text(
        "import sys\nfrom unsloth import FastLanguageModel as f\n"
        "with open(sys.argv[1], 'w') as out:\n"
        "    out.write(f.__module__ + ' ' + ' '.join(sys.argv[2:]))\n"
    )
    done = call("run", script, out, "--flag", "value")
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    assert done.exit_code == 0, done.output
    assert out.read_text() == "hasten.model --flag value"
    assert call("run", tmp_path / "none.py").exit_code == FAILED
