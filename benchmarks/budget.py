"""Step time against memory budget: one model, loaded once, under budgets from what "offload" needs to four times that.

    python -m benchmarks.budget --out FOLDER --checkpoints FOLDER [--job 8b-qlora]          writes FOLDER/budget.json
"offload" goes first; what is predicted of it is the least, 1x. Then "auto" plans for each budget and for none, and takes one
step to warm up and three timed ones. A row is ok where every loss is finite and no step took more than its budget.
"""

import argparse
import datetime
import gc
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.jobs import GIB, JOBS
from benchmarks.train_step import DEVICE, Steps, forget_peaks, load, peaks
from benchmarks.variants import planned

TIMES = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Budgets, as multiples of the least."""
WARM, TIMED = 1, 3


@dataclass(frozen=True)
class Asked:
    """What the model is switched to. mode: as `use_gradient_checkpointing`. times: of the least; None = no budget."""

    mode: str
    times: float | None = None
    budget: int | None = None


def measure(name: str, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """The rows of one job, each as soon as it is there: "offload", each of TIMES, no budget."""
    _, steps = load("hasten", name, "offload", checkpoints)
    facts: dict[str, Any] = {"job": name}
    least = facts | one_row(steps, Asked("offload"))
    yield least
    for times in TIMES:
        yield facts | one_row(steps, Asked("auto", times, int(times * least["predicted_gib"] * GIB)))
    yield facts | one_row(steps, Asked("auto"))


def one_row(steps: Steps, asked: Asked) -> dict[str, Any]:
    """{"mode", "times", "budget_gib", "predicted_gib", "peak_gib", "reserved_gib", "ms", "losses", "plan", "ok"}."""
    from hasten.training import checkpointing

    checkpointing.enable(steps.model, asked.mode, asked.budget)
    gc.collect()  # what the plan before held
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    forget_peaks()
    taken = [steps.timed(steps.batch()) for _ in range(WARM + TIMED)]
    losses = [float(loss) for _, loss in taken]
    budget = None if asked.budget is None else asked.budget / GIB
    row = {"mode": asked.mode, "times": asked.times, "budget_gib": budget, **peaks(), "losses": losses}
    row["ms"] = statistics.median(seconds for seconds, _ in taken[WARM:]) * 1e3
    row |= planned(steps.model, steps.job.batch, steps.job.length)
    row["ok"] = all(map(math.isfinite, losses)) and (budget is None or row["peak_gib"] <= budget)
    return row


def line_of(row: dict[str, Any]) -> str:
    limit = "no budget" if row["budget_gib"] is None else f"{row['times']:g}x {row['budget_gib']:.2f} GiB"
    return (
        f"{row['job']} {row['mode']:7s} {limit:18s} {row['ms']:8.1f} ms  measured {row['peak_gib']:6.2f}, predicted "
        f"{row['predicted_gib']:6.2f} GiB  {'ok' if row['ok'] else 'NOT OK'}  loss {row['losses'][0]:.4f}  {row['plan']}"
    )


def run(job: str, out: Path, checkpoints: Path) -> int:
    """Measures, writes `budget.json` into `out` after every row. 1 where a row is not ok."""
    for folder in (out, checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    result = {"date": datetime.date.today().isoformat(), "versions": results.versions(), "budget": []}
    for row in measure(job, checkpoints):
        result["budget"].append(row)
        results.write(result, out / "budget.json")
        print(line_of(row), flush=True)
    return 0 if all(row["ok"] for row in result["budget"]) else 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--job", choices=sorted(JOBS), default="8b-qlora")
    args = parser.parse_args(arguments)
    return run(args.job, args.out, args.checkpoints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
