"""hasten's measured memory peaks and those that `hasten.training.memory.costs` predicts, as a table in docs/memory.md."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks import tables
from benchmarks.harness.checkpoints import config_of
from benchmarks.harness.jobs import GIB, JOBS
from benchmarks.harness.results import FOLDER, read
from benchmarks.tables import Columns, Row

PAGE = Path(__file__).parents[1] / "docs/memory.md"
BEGIN, END = "<!-- python -m benchmarks.publish -->", "<!-- end -->"
MODES = {"keep": "SAVE_ALL", "recompute": "RECOMPUTE", "offload": "OFFLOAD"}
PLANNED = {"default", "budget"}
"""Modes whose plan depends on free memory or a budget: their rows hold the prediction of that time."""


@dataclass(frozen=True)
class Compared:
    """One measured row; GiB. when: the phase of the step that has the predicted peak."""

    name: str
    measured: float
    predicted: float
    when: str

    @property
    def error(self) -> float:
        """Of the prediction, relative to the measurement."""
        return self.predicted / self.measured - 1


def compared(folder: Path = FOLDER) -> list[Compared]:
    """Every row of hasten in `folder` that has a peak. Raises KeyError for an unknown mode."""
    found: list[Compared] = []
    for path in sorted(folder.glob("*.json")):
        result = read(path)
        for row in result.get("train", []):
            if row["variant"] == "hasten" and row.get("peak_gib"):
                name = f"{row['job']}, {row['mode']}, {row['batch']} x {row['length']}"
                found.append(_as_planned(row, name) if row["mode"] in PLANNED else _compare(row, name))
        found += [_as_planned(row, f"{row['job']}, budget {row['budget_gib']:.1f} GiB") for row in result.get("budget", [])
                  if row["budget_gib"] is not None]  # fmt: skip
        found += [_as_planned(row, f"8b-qlora r=32, longest, 1 x {row['length']}") for row in result.get("longest", [])
                  if row["variant"] == "hasten" and row["ok"]]  # fmt: skip
    return list(dict.fromkeys(found))


def _as_planned(row: Row, name: str) -> Compared:
    return Compared(name, row["peak_gib"], row["predicted_gib"], "as planned then")


def _compare(row: Row, name: str) -> Compared:
    from hasten.training.memory.actions import ActivationAction
    from hasten.training.memory.costs import ModelShape, peak

    job = JOBS[row["job"]]
    shape = ModelShape.of_config(config_of(job.shape), 16, "4bit" if job.kind == "qlora" else None, job.kind == "full")
    found = peak(shape, row["batch"], row["length"], ActivationAction[MODES[row["mode"]]])
    return Compared(name, row["peak_gib"], found.total / GIB, found.when)


def table() -> str:
    """Markdown."""
    columns: Columns = {
        "job, mode, sequences x tokens": "{0.name}", "measured, GiB": "{0.measured:.2f}",
        "predicted, GiB": "{0.predicted:.2f}", "off by": lambda one: f"{100 * one.error:+.1f}%", "where the peak is": "{0.when}",
    }  # fmt: skip
    return tables.table(columns, sorted(compared(), key=lambda one: one.name), "---")


def page(text: str) -> str:
    """Replaces the table between the two marks of `text`."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
