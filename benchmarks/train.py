"""Races the libraries in each job and mode; hasten is also profiled and asked for its host waits and new lengths.

python -m benchmarks.gpu --out FOLDER --only train [--jobs ...] [--variants ...] [--modes ...] [--profile] [--no-costs]
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.harness import jobs, race
from benchmarks.harness.checkpoints import write_apart
from benchmarks.harness.results import Record, line_of
from benchmarks.harness.workers import Worker, WorkerFailed
from benchmarks.limits import alone_ms
from benchmarks.step_costs import import_seconds

LENGTHS = (2048, 2000, 1999, 1537)


class Training:
    """The races of all jobs and modes, written to `record` after each group."""

    def __init__(self, args: argparse.Namespace, record: Record) -> None:
        self.args, self.record = args, record
        self.plan = race.Plan(rounds=args.rounds, steps=args.steps, load_alone=args.load_alone)
        self.longest, self.profiled = 0.0, set[str]()
        self.costs = record.result.setdefault("fixed_costs", {})
        record.result |= {"train": [], "left_out": []}

    def run(self) -> bool:
        """Returns whether every library that has figures agrees with transformers."""
        for job in self.args.jobs:
            for mode in self.args.modes:
                self._run(job, mode)
        left_out = self.record.result["left_out"]
        self.record.put("left_out", left_out, *(f"left out, no time: {line}" for line in left_out))
        return all(row.get("parity", {}).get("ok", True) for row in self.record.result["train"])

    def _run(self, job: str, mode: str) -> None:
        rows: list[dict[str, Any]] = []
        done, shape, alone = self.record.result["train"], jobs.JOBS[job], None
        room = self.args.room or torch.cuda.get_device_properties(0).total_memory / jobs.GIB * 0.94
        for group in race.groups(job, mode, self.args.variants, room):
            begin = time.perf_counter()
            if begin - self.record.begin + self.longest > self.args.minutes * 60:
                self.record.result["left_out"].append(f"{job} {mode} {'+'.join(group)}")
                continue
            self._write_checkpoint(job)
            rows += race.race(
                group, lambda v: self._start(job, mode, v), self.plan, lambda lane: self._ask(job, mode, lane)
            )
            self._shorten_errors(rows[-len(group) :])
            self.longest = max(self.longest, time.perf_counter() - begin)
            alone = alone or (alone_ms(job, mode) if torch.cuda.is_available() else None)
            torch.cuda.empty_cache()
            facts = {"job": job, "mode": mode, "shape": shape.shape, "batch": shape.batch, "length": shape.length}
            checked = [{**facts, "alone_ms": alone, **row} for row in race.with_parity(rows)]
            self.record.put("train", [*done, *checked], *map(race.line_of, checked[-len(group) :]))

    def _shorten_errors(self, rows: list[dict[str, Any]]) -> None:
        """Leaves the first line of each error in its row; errors.txt gets all of it."""
        for row in rows:
            if "error" in row:
                self._log("errors.txt", f"{row['variant']} of {row['group']}", row["error"])
                row["error"] = row["error"].splitlines()[0][:300]

    def _log(self, file: str, title: str, text: str) -> None:
        with (self.args.out / file).open("a") as log:
            log.write(f"==== {title}\n{text}\n\n")

    def _write_checkpoint(self, job: str) -> None:
        write_apart(jobs.JOBS[job].shape, self.args.checkpoints)

    def _start(self, job: str, mode: str, variant: str) -> Worker:
        return Worker(variant, race.command_for(job, mode, variant, str(self.args.checkpoints), self.args.before))

    def _ask(self, job: str, mode: str, lane: race.Lane) -> None:
        if lane.row["variant"] != "hasten":
            return
        name = f"{job} {mode}"
        try:
            if self.args.profile and name not in self.profiled:
                self.profiled.add(name)
                profiled = lane.worker.ask(self.plan.turn_limit, "profile", wall_s=lane.row["ms"] / 1e3)
                self._log("profiles.txt", f"{job}, hasten, {mode}", profiled["text"])
                lane.row["profile"] = profiled["summary"]
            if not self.args.no_costs and name not in self.costs:
                self.costs[name] = lane.worker.ask(self.plan.turn_limit, "costs", lengths=LENGTHS)
        except WorkerFailed as error:
            lane.row["afterwards"] = str(error)


def run(args: argparse.Namespace, record: Record) -> bool:
    """Returns whether all races agree."""
    if not args.no_costs:
        seconds = import_seconds()
        record.put("fixed_costs", {"import": seconds}, f"imports: {line_of(seconds)}")
    return Training(args, record).run()
