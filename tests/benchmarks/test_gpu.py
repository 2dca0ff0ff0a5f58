"""The one command of a GPU run, on a CPU, with workers that only pretend."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_kit import fake_command

from benchmarks import gpu, train
from benchmarks.harness.workers import Worker

TRAIN = ["--only", "train", "--jobs", "8b-lora", "--modes", "keep", "--no-costs", "--room", "140", "--minutes", "1"]


def run(monkeypatch: pytest.MonkeyPatch, out: Path, told: dict[str, dict[str, Any]], *more: str) -> tuple[int, Any]:
    monkeypatch.setattr(train.Training, "_write_checkpoint", lambda self, job: None)
    monkeypatch.setattr(train.Training, "_start", lambda self, job, mode, v: Worker(v, fake_command(name=v, **told[v])))
    code = gpu.main(["--out", str(out), *TRAIN, "--variants", ",".join(told), *more])
    return code, json.loads((out / "results.json").read_text())


def test_a_run_that_agrees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(
        monkeypatch, tmp_path, {"hasten": {}, "transformers": {"seconds": 0.3}, "liger": {"die_at": "run"}}
    )
    assert code == 0
    rows = {row["variant"]: row for row in result["train"]}
    assert rows["hasten"]["job"] == "8b-lora" and rows["hasten"]["parity"]["ok"]
    assert rows["transformers"]["ms"] == pytest.approx(300)
    assert rows["liger"]["error"] == "died with exit code 7"
    assert "segmentation fault" in (tmp_path / "errors.txt").read_text()
    printed = capsys.readouterr().out
    assert "8b-lora keep hasten" in printed and "within 0.0e+00 of transformers" in printed


def test_a_run_that_does_not_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(monkeypatch, tmp_path, {"hasten": {"drift": 1e-3}, "transformers": {}})
    assert code == 1 and "ms" not in result["train"][0] and not result["train"][0]["parity"]["ok"]
    ours = next(line for line in capsys.readouterr().out.splitlines() if "hasten" in line)
    assert "PARITY FAILED" in ours and " ms" not in ours


def test_what_there_is_no_time_for_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(monkeypatch, tmp_path, {"hasten": {}, "trl": {}}, "--minutes", "0")
    assert code == 0 and result["train"] == [] and result["left_out"] == ["8b-lora keep hasten+trl"]


@pytest.mark.parametrize(
    "wrong", [["--only", "test"], ["--jobs", "9b"], ["--variants", "hasten,peft"], ["--modes", "all"]]
)
def test_unknown_names_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--out", "nowhere", *wrong])
    assert f"no such {wrong[1].split(',')[-1]}" in capsys.readouterr().err
