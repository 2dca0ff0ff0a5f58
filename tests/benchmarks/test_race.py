"""Libraries that take turns: order, figures, failures that do not stop the others, and losses that must agree."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmark_kit import fake_command, train_row

from benchmarks.harness import jobs, race
from benchmarks.harness.checkpoints import write_apart
from benchmarks.harness.workers import Worker, WorkerFailed

PLAN = race.Plan(warm=3, rounds=2, steps=3, untimed=1, load_limit=20, turn_limit=20)


def run(told: dict[str, dict[str, Any]], plan: race.Plan = PLAN) -> dict[str, dict[str, Any]]:
    rows = race.race(list(told), lambda name: Worker(name, fake_command(name=name, **told[name])), plan)
    return {row["variant"]: row for row in rows}


def test_turns_are_interleaved_and_figures_are_medians(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    rows = run({"hasten": {"seconds": 0.2, "log": log}, "unsloth": {"seconds": 0.3, "log": log}})
    turns = [line.split() for line in Path(log).read_text().splitlines()]
    assert turns == [["hasten", "warm"], ["unsloth", "warm"]] + [["hasten", "run"], ["unsloth", "run"]] * 2
    row = rows["hasten"]
    assert row["ms"] == pytest.approx(200) and rows["unsloth"]["ms"] == pytest.approx(300)
    assert row["steps"] == 6 and len(row["losses"]) == 3 + 2 * 4
    assert row["peak_gib"] == 3.0 + 2 and row["first_step_s"] == 2.5 and row["load_s"] == 1.5
    assert row["group"] == "hasten+unsloth" and row["loaded_beside"] == 1


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ({"die_at": "warm"}, "exit code 7"),
        ({"die_at": "run"}, "segmentation fault"),
        ({"fail_at": "run"}, "OutOfMemoryError"),
    ],
)
def test_one_that_fails_is_recorded_and_the_others_go_on(behaviour: dict[str, Any], said: str) -> None:
    rows = run({"hasten": {}, "liger": behaviour, "transformers": {}})
    assert said in rows["liger"]["error"] and "ms" not in rows["liger"]
    assert rows["hasten"]["steps"] == rows["transformers"]["steps"] == 6


def test_one_that_never_answers_is_ended() -> None:
    plan = race.Plan(warm=1, rounds=1, steps=1, load_limit=1, turn_limit=20)
    assert "no answer within 1 s" in run({"unsloth": {"silent": True}}, plan)["unsloth"]["error"]


def test_workers_end_even_where_the_race_breaks() -> None:
    started: list[Worker] = []

    def start(name: str) -> Worker:
        started.append(Worker(name, fake_command(name=name)))
        return started[-1]

    def breaks(lane: race.Lane) -> None:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        race.race(["hasten", "liger"], start, PLAN, breaks)
    assert [worker._process.poll() for worker in started] == [0, 0]
    with pytest.raises(WorkerFailed):
        started[0].ask(5, "run", steps=1, untimed=0)


@pytest.mark.parametrize(("scale", "ok"), [(1.02, True), (2.0, False)])
def test_gradients_that_are_off_fail(scale: float, ok: bool) -> None:
    sample = [1.0, -2.0, 0.5]
    rows = [
        {"variant": "hasten", "losses": [1.0], "ms": 1.0, "gradients": [scale * g for g in sample]},
        {"variant": "transformers", "losses": [1.0], "ms": 2.0, "gradients": sample},
    ]
    mine, stock = race.with_parity(rows)
    assert mine["parity"]["ok"] is ok and ("ms" in mine) is ok and "gradients" not in {*mine, *stock}
    assert mine["parity"]["gradients"] == pytest.approx(scale - 1)


def test_parity_is_asked_at_every_step() -> None:
    rows = run({"hasten": {"drift": 3e-4}, "transformers": {}, "liger": {"loss": 5.0015}})
    checked = {row["variant"]: row for row in race.with_parity(list(rows.values()))}
    assert checked["hasten"]["parity"] == {
        "ok": False, "worst": pytest.approx(3e-3), "step": 10, "compared": 11, "against": "transformers", "gradients": None,
    }  # fmt: skip
    assert not set(race.FIGURES) & set(checked["hasten"]) and len(checked["hasten"]["losses"]) == 11
    assert checked["liger"]["parity"]["ok"] and "ms" in checked["liger"]
    assert "ms" in checked["transformers"] and "parity" not in checked["transformers"]
    line = race.line_of({"job": "8b-lora", "mode": "keep", **checked["hasten"]})
    assert "PARITY FAILED" in line and "3.00e-03" in line and " ms" not in line


def test_without_transformers_the_first_peer_is_compared_with_and_nan_agrees_with_nobody() -> None:
    rows = [train_row("hasten", 1, losses=[1.0, math.nan]), train_row("unsloth", 1, losses=[1.0, 1.0])]
    mine, theirs = race.with_parity(rows)
    assert mine["parity"]["against"] == "unsloth" and not mine["parity"]["ok"] and "ms" not in mine
    assert theirs["parity"] == {"against": None} and "ms" in theirs
    dead = train_row("transformers", 1, error="out of memory")
    assert race.with_parity([rows[0], dead])[0]["parity"] == {"against": None}


def test_groups_fit_and_share_the_first() -> None:
    variants = ["hasten", "unsloth", "liger", "transformers"]
    assert race.groups("1b-lora", "recompute", variants, 128) == [variants]
    split = race.groups("8b-lora", "keep", variants, 128)
    assert len(split) > 1 and all(group[0] == "hasten" for group in split)
    assert sorted(v for group in split for v in group[1:]) == sorted(variants[1:])
    for group in split:
        need = [jobs.memory_gib(jobs.JOBS["8b-lora"], "keep", v) for v in group]
        assert sum(paused for paused, _ in need) + max(step - paused for paused, step in need) <= 128
    assert race.groups("1b-lora", "keep", ["hasten"], 128) == [["hasten"]]


def test_memory_guesses_are_above_what_was_measured() -> None:
    """Peaks that an H200 showed, GiB: too low a guess would make a group run out of memory."""
    seen = {
        ("8b-lora", "keep", "transformers"): 80.4, ("8b-lora", "keep", "liger"): 58.6, ("8b-lora", "keep", "unsloth"): 46.5,
        ("8b-lora", "recompute", "transformers"): 29.5, ("8b-qlora", "keep", "unsloth"): 36.3,
        ("1b-lora", "recompute", "transformers"): 27.2, ("1b-full", "recompute", "transformers"): 31.7,
        ("1b-full", "keep", "hasten"): 49.1, ("gemma-2b-qlora", "recompute", "transformers"): 28.9,
        ("command-r-qlora", "recompute", "transformers"): 39.9, ("command-r-qlora", "keep", "hasten"): 16.5,
    }  # fmt: skip
    for (job, mode, variant), gib in seen.items():
        assert gib <= jobs.memory_gib(jobs.JOBS[job], mode, variant)[1] <= 2.2 * gib, (job, mode, variant)


@pytest.mark.full
def test_a_real_worker_steps_and_says_what_it_was_asked(tmp_path: Path) -> None:
    """hasten and transformers, a tiny model on the CPU, through the processes that a GPU run uses."""
    write_apart("tiny", tmp_path)
    costs: dict[str, Any] = {}

    def ask(lane: race.Lane) -> None:
        if lane.row["variant"] == "hasten":
            costs.update(lane.worker.ask(60, "costs", lengths=[64, 33]))
            costs.update(lane.worker.ask(60, "profile", wall_s=0.1))

    def start(variant: str) -> Worker:
        return Worker(variant, race.command_for("tiny-lora", "keep", variant, str(tmp_path)))

    plan = race.Plan(warm=1, rounds=1, steps=2, load_limit=120)
    mine, stock = race.with_parity(race.race(["hasten", "transformers"], start, plan, ask))
    assert "error" not in mine and "error" not in stock, json.dumps([mine, stock])
    assert mine["parity"]["ok"] and mine["parity"]["compared"] == 4 and mine["parity"]["worst"] > 0
    assert mine["ms"] > 0 and len(set(mine["losses"])) == 4
    assert costs["host_waits"]["count"] == 0 and [row["length"] for row in costs["lengths"]] == [64, 33]
    assert "Self CPU" in costs["text"]
    assert mine["predicted_gib"] > 0 and "save all activations" in mine["plan"] and "plan" not in stock
