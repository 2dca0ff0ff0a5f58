"""hasten raced against another checkout of itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmark_kit import fake_command, train_row

import hasten
from benchmarks import gpu, train
from benchmarks.harness import race
from benchmarks.harness.checkpoints import write_apart
from benchmarks.harness.workers import Worker, WorkerFailed

PLAN = race.Plan(warm=1, rounds=2, steps=2, load_limit=120)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with another copy of the package, which can be told apart."""
    package = tmp_path / "tree/hasten"
    shutil.copytree(Path(hasten.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "errors.py").open("a") as file:
        file.write('\nimport sys\nprint("the other tree", file=sys.stderr)\n')
    return tmp_path / "tree"


@pytest.mark.full
def test_two_trees_step_alike_in_processes_of_their_own(tree: Path, tmp_path: Path) -> None:
    write_apart("tiny", tmp_path)
    logs: dict[str, str] = {}

    def start(variant: str) -> Worker:
        return Worker(variant, race.command_for("tiny-lora", "keep", variant, str(tmp_path), tree))

    rows = race.race(
        ["hasten", "hasten-before"], start, PLAN, lambda lane: logs.update({lane.row["variant"]: lane.worker._tail()})
    )
    now, before = race.with_parity(rows)
    assert "error" not in now and "error" not in before, json.dumps([now, before])
    assert "the other tree" in logs["hasten-before"] and "the other tree" not in logs["hasten"]
    assert "plan" in now and "plan" not in before and "predicted_gib" not in before
    assert now["before"]["worst"] == 0 and now["before"]["ok"] and now["parity"]["against"] == "hasten-before"
    assert now["before"]["ratio"] == pytest.approx(now["ms"] / before["ms"]) and len(now["before"]["rounds"]) == 2


@pytest.mark.full
def test_a_folder_without_the_package_is_an_error(tmp_path: Path) -> None:
    worker = Worker("hasten-before", race.command_for("tiny-lora", "keep", "hasten-before", str(tmp_path), tmp_path))
    with pytest.raises(WorkerFailed, match="hasten was to be imported from"):
        worker.reply(60)


def test_ratios_are_of_rounds_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    told = {
        "hasten": {"seconds": 0.2},
        "hasten-before": {"seconds": 0.25, "peak": 2.5},
        "transformers": {"seconds": 0.4},
    }
    monkeypatch.setattr(train.Training, "_write_checkpoint", lambda self, job: None)
    monkeypatch.setattr(train.Training, "_start", lambda self, job, mode, v: Worker(v, fake_command(name=v, **told[v])))
    (tmp_path / "tree/hasten").mkdir(parents=True)
    (tmp_path / "tree/hasten/__init__.py").touch()
    code = gpu.main(
        ["--out", str(tmp_path), "--only", "train", "--jobs", "8b-lora", "--modes", "keep", "--no-costs", "--room", "999",
         "--variants", ",".join(told), "--before", str(tmp_path / "tree")]
    )  # fmt: skip
    row = json.loads((tmp_path / "results.json").read_text())["train"][0]
    assert code == 0 and row["parity"]["against"] == "transformers"
    assert row["before"]["ratio"] == pytest.approx(0.8) and row["before"]["rounds"] == [pytest.approx(0.8)] * 3
    assert row["before"]["peak_gib"] == 0.5
    assert "0.8000 of the time before (0.8000 to 0.8000 by round), +0.50 GiB" in capsys.readouterr().out


def test_two_trees_that_disagree_have_no_ratio() -> None:
    rows = [
        train_row("hasten", 1, losses=[1.0, 1.0015], round_ms=[1.0]),
        train_row("transformers", 2, losses=[1.0, 1.0]),
        train_row("hasten-before", 3, losses=[1.0, 0.999], round_ms=[2.0]),
    ]
    mine, *_ = race.with_parity(rows)
    assert not mine["before"]["ok"] and "ratio" not in mine["before"] and "ms" not in mine
    assert not mine["parity"]["ok"] and mine["parity"]["against"] == "hasten-before"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--variants", "hasten,hasten-before"], "go together"),
        (["--before", "."], "go together"),
        (["--variants", "hasten,hasten-before", "--before", "nowhere"], "package hasten in it"),
    ],
)
def test_a_tree_and_its_variant_go_together(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--out", "nowhere", *given])
    assert said in capsys.readouterr().err
