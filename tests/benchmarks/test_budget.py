"""The sweep over budgets: what is asked for, what is recorded, and rows that are not ok."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_kit import budget_row

from benchmarks import budget, gpu, memory_tables, plots
from benchmarks.harness import results
from benchmarks.harness.jobs import GIB, JOBS
from benchmarks.harness.steps import load


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the whole sweep says of a tiny model on a CPU."""
    folder = tmp_path_factory.mktemp("budget")
    more = ["--checkpoints", str(folder / "points"), "--only", "budget", "--jobs", "tiny-lora"]
    assert gpu.main(["--out", str(folder / "out"), *more]) == 0
    return json.loads((folder / "out/results.json").read_text())


def test_the_whole_sweep_on_a_cpu(written: dict[str, Any]) -> None:
    least, *planned = written["budget"]
    assert least["mode"] == "offload" and "CPU memory" in least["plan"]
    assert [row["times"] for row in planned] == [*budget.TIMES, None]
    for row in planned[:-1]:
        assert row["budget_gib"] == pytest.approx(row["times"] * least["predicted_gib"])
    for row in written["budget"]:
        assert row["ok"] and row["ms"] > 0 and row["predicted_gib"] > 0 and len(row["losses"]) == 4
    assert planned[-1]["plan"] == "2 of 2 layers save all activations"
    assert len({row["losses"][0] for row in written["budget"]}) > 1, "every row takes new steps"


def test_rows_of_a_later_sweep_replace_those_of_an_earlier_one(written: dict[str, Any]) -> None:
    later = written | {"budget": [row | {"ms": 7.0, "budget_gib": 0.5} for row in written["budget"]]}
    merged = results.merge([written, later])
    assert [row["ms"] for row in merged["budget"]] == [7.0] * len(later["budget"])


def test_a_row_beyond_its_budget_or_without_a_loss_is_not_ok(
    written: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, steps = load("hasten", JOBS["tiny-lora"], "offload", tmp_path)
    monkeypatch.setattr(budget, "peaks", lambda: {"peak_gib": 3.0, "reserved_gib": 4.0})
    assert budget.one_row(steps, budget.Asked("auto", 1.0, 3 * GIB))["ok"]
    beyond = budget.one_row(steps, budget.Asked("auto", 1.0, 3 * GIB - 1))
    assert not beyond["ok"] and "NOT OK" in results.line_of({"job": "tiny-lora", **beyond})
    plain = steps.loss
    monkeypatch.setattr(steps, "loss", lambda ids: plain(ids) * float("nan"))
    assert not budget.one_row(steps, budget.Asked("auto"))["ok"]


def test_the_table_and_the_plot_say_what_was_measured(tmp_path: Path) -> None:
    rows = [
        budget_row("offload", None, None, ms=900.0),
        budget_row("auto", 1.5, 12.0, ms=700.0, ok=False),
        budget_row("auto", None, None, ms=500.0),
    ]
    result = {"budget": rows, "versions": {"gpu": "NVIDIA H900"}}
    text = memory_tables.budget_table(result)
    assert '| 8b-qlora | "offload" | - | 8.00 | 7.60 | -5.0% | yes | 900 |' in text
    assert "| 8b-qlora | 1.5x | 12.00 | 8.00 | 7.60 | -5.0% | no | 700 |" in text
    plots.budget(result, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
