"""hasten's measured peaks beside the ones that `hasten.training.memory.costs` predicts, as a table in docs/memory.md.

python -m benchmarks.predicted            writes the table anew from benchmarks/results
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import GIB, JOBS
from benchmarks.shapes import config_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/memory.md"
BEGIN, END = "<!-- python -m benchmarks.predicted -->", "<!-- end -->"
MODES = {"keep": "SAVE_ALL", "recompute": "RECOMPUTE", "offload": "OFFLOAD"}
PLANNED = {"default", "budget"}
"""Modes whose actions depended on the memory that was free, or allowed: what was predicted then is in the row."""


@dataclass(frozen=True)
class Compared:
    """One measured row; GiB. when: the moment of the predicted peak."""

    name: str
    measured: float
    predicted: float
    when: str

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


def compared() -> list[Compared]:
    """Every row of hasten in benchmarks/results that has a peak. Raises KeyError for an unknown mode."""
    found: list[Compared] = []
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        result = json.loads(path.read_text())
        for row in result.get("train", []):
            if row["variant"] == "hasten" and row.get("peak_gib"):
                found.append(_as_planned(row, _name(row)) if row["mode"] in PLANNED else _compare(row))
        found += [_as_planned(row, f"{row['job']}, budget {row['budget_gib']:.1f} GiB") for row in result.get("budget", [])
                  if row["budget_gib"] is not None]  # fmt: skip
        found += [_as_planned(row, f"8b-qlora r=32, longest, 1 x {row['length']}") for row in result.get("longest", [])
                  if row["variant"] == "hasten" and row["ok"]]  # fmt: skip
    return list(dict.fromkeys(found))


def _name(row: dict[str, Any]) -> str:
    return f"{row['job']}, {row['mode']}, {row['batch']} x {row['length']}"


def _as_planned(row: dict[str, Any], name: str) -> Compared:
    """A row that says what was predicted when it was measured."""
    return Compared(name, row["peak_gib"], row["predicted_gib"], "as planned then")


def _compare(row: dict[str, Any]) -> Compared:
    from hasten.training.memory.actions import ActivationAction
    from hasten.training.memory.costs import ModelShape, peak

    job, batch, length = JOBS[row["job"]], row["batch"], row["length"]
    shape = ModelShape.of_config(config_of(job.shape), 16, "4bit" if job.kind == "qlora" else None, job.kind == "full")
    found = peak(shape, batch, length, ActivationAction[MODES[row["mode"]]])
    return Compared(_name(row), row["peak_gib"], found.total / GIB, found.when)


def table() -> str:
    """Markdown."""
    lines = [
        "| job, mode, rows x tokens | measured, GiB | predicted, GiB | off by | where the peak is |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {one.measured:.2f} | {one.predicted:.2f} | {100 * one.error:+.1f}% | {one.when} |"
        for one in sorted(compared(), key=lambda one: one.name)
    ]
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with the table between its two marks made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
