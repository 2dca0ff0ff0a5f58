"""Step time against memory budget: one model, loaded once, under budgets from the predicted peak of "offload" to four times that.

    python -m benchmarks.gpu --out FOLDER --only budget --jobs 8b-qlora
"offload" runs first; its predicted peak is the least budget, 1x. Then "auto" plans for each budget and for none, and takes one
warm-up and three timed steps. A row is ok if every loss is finite and the peak stays within the budget.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.jobs import GIB, JOBS
from benchmarks.harness.results import Record
from benchmarks.harness.steps import Steps, load, peaks, reset_peaks

TIMES = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Budgets, as multiples of the least."""
WARM, TIMED = 1, 3


@dataclass(frozen=True)
class Asked:
    """mode: as `use_gradient_checkpointing`. times: multiple of the least budget, None = no budget. budget: bytes."""

    mode: str
    times: float | None = None
    budget: int | None = None


def measure(name: str, checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of one job: "offload", each of TIMES, no budget."""
    _, steps = load("hasten", JOBS[name], "offload", checkpoints)
    least = one_row(steps, Asked("offload"))
    yield {"job": name} | least
    budgets = [Asked("auto", times, int(times * least["predicted_gib"] * GIB)) for times in TIMES]
    for asked in [*budgets, Asked("auto")]:
        yield {"job": name} | one_row(steps, asked)


def one_row(steps: Steps, asked: Asked) -> dict[str, Any]:
    """{"mode", "times", "budget_gib", "predicted_gib", "peak_gib", "reserved_gib", "ms", "losses", "plan", "ok"}."""
    from hasten.training import checkpointing

    checkpointing.enable(steps.model, asked.mode, asked.budget)
    reset_peaks(empty_cache=True)
    taken = [steps.timed(steps.batch()) for _ in range(WARM + TIMED)]
    losses = [float(loss) for _, loss in taken]
    budget = None if asked.budget is None else asked.budget / GIB
    row = {"mode": asked.mode, "times": asked.times, "budget_gib": budget, **peaks(), "losses": losses}
    row["ms"] = statistics.median(seconds for seconds, _ in taken[WARM:]) * 1e3
    ok = all(map(math.isfinite, losses)) and (budget is None or row["peak_gib"] <= budget)
    return row | steps.planned() | {"ok": ok}


def run(args: argparse.Namespace, record: Record) -> bool:
    return record.rows("budget", (row for job in args.jobs for row in measure(job, args.checkpoints)))
