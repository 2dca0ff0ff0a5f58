"""The quick demo from end to end, and each of its judgements with something wrong seeded."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hasten.demo import pipeline
from hasten.demo.evaluate import Score
from hasten.demo.pipeline import QUICK, run_demo
from hasten.demo.verify import LARGEST_SHARE, Agreement
from hasten.errors import AccuracyError


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The quick demo's folder and what was said on the way, by the command itself, with the network cut off."""
    out = tmp_path_factory.mktemp("demo")
    script = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from hasten.cli import app\n"
        "app()\n"
    )
    command = [sys.executable, "-c", script, "demo", "--quick", "--out", str(out / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out / "demo", done.stdout


def test_held_out_losses_fall_and_the_merge_agrees(told: tuple[Path, str]) -> None:
    summary = json.loads((told[0] / "summary.json").read_text())
    for name in ("reworded", "untaught"):
        before, after = summary["held_out"]["before"][name], summary["held_out"]["after"][name]
        assert after["loss"] < before["loss"] and before["total"] == after["total"] > 0
    assert 0 < summary["merge"]["share"] < LARGEST_SHARE
    assert summary["merge"]["max_effect_of_adapter"] > 1
    assert not summary["merge"]["hasten_imported"]


def test_artefacts_are_there_and_agree_with_each_other(told: tuple[Path, str]) -> None:
    out, said = told
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["masked_percent"] > 30
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    answers = json.loads((out / "answers.json").read_text())
    for name in ("reworded", "untaught"):
        mine = [a for a in answers if a["set"] == name]
        assert len(mine) == summary["held_out"]["after"][name]["total"]
        assert sum(a["after"] == a["answer"] for a in mine) == summary["held_out"]["after"][name]["exact"]
    report = (out / "report.txt").read_text()
    assert "LlamaAttention" in report and "nf4" in report and report.splitlines()[0] in said
    assert (out / "merged/model.safetensors").exists() and (out / "model/adapter_model.safetensors").exists()


def test_a_failure_of_either_promise_is_an_error(told: tuple[Path, str]) -> None:
    summary = json.loads((told[0] / "summary.json").read_text())
    facts = {name: value for name, value in summary["merge"].items() if name != "share"}
    good = Agreement(**facts)
    good.check()
    with pytest.raises(AccuracyError, match="off base"):
        replace(good, rms_difference=good.rms_effect_of_adapter * 0.03).check()
    with pytest.raises(AccuracyError, match="off base"):
        replace(good, rms_difference=float("nan")).check()
    with pytest.raises(AccuracyError, match="imported hasten"):
        replace(good, hasten_imported=True).check()
    score = Score(loss=1.0, exact=0, total=1, answers=("",))
    better = replace(score, loss=0.5)
    pipeline._check({"reworded": score, "untaught": score}, {"reworded": better, "untaught": better}, good)
    with pytest.raises(AccuracyError, match="untaught questions was 1.0000 before and is 1.0000"):
        pipeline._check({"reworded": score, "untaught": score}, {"reworded": better, "untaught": score}, good)


def test_a_merge_that_forgets_one_matrix_is_noticed(told: tuple[Path, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from hasten.demo.corpus import build
    from hasten.demo.verify import compare_in_plain_transformers

    out = told[0]
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in (out / "merged").iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "merged/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = load_file(out / "base/model.safetensors")[name]
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    questions = build(QUICK.facts).reworded
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    found = compare_in_plain_transformers(out / "base", out / "model", merged, tokenizer, questions, tmp_path)
    with pytest.raises(AccuracyError):
        found.check()


def test_it_can_be_told_again_into_the_same_folder(told: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a base that hardly learns and a fine-tuning that does nothing, it must end in an error."""
    dull = replace(QUICK, base=replace(QUICK.base, steps=2), learning_rate=0.0, epochs=1)
    with pytest.raises(AccuracyError, match="did not help"):
        run_demo(told[0], Console(quiet=True), dull)
