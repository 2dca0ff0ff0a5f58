"""Races the libraries in each job and mode; hasten is also profiled and asked for its host waits and new lengths."""

import argparse
import time
from typing import Any

import torch

from benchmarks.harness import jobs, race
from benchmarks.harness.checkpoints import write_apart
from benchmarks.harness.results import Record
from benchmarks.harness.workers import Worker, WorkerFailed

LENGTHS = (2048, 2000, 1999, 1537)


class Training:
    """The races of all jobs and modes, written to `record` after each group. begin: when the whole call began."""

    def __init__(self, args: argparse.Namespace, record: Record, begin: float) -> None:
        self.args, self.record, self.begin = args, record, begin
        self.plan = race.Plan(rounds=args.rounds, steps=args.steps, load_alone=args.load_alone)
        self.longest, self.profiled = 0.0, set[tuple[str, str]]()
        self.costs = record.result.setdefault("fixed_costs", {})
        record.result |= {"train": [], "left_out": []}

    def room_gib(self) -> float:
        return self.args.room or torch.cuda.get_device_properties(0).total_memory / jobs.GIB * 0.94

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
        for group in race.groups(job, mode, self.args.variants, self.room_gib()):
            if time.perf_counter() - self.begin + self.longest > self.args.minutes * 60:
                self.record.result["left_out"].append(f"{job} {mode} {'+'.join(group)}")
                continue
            begin = time.perf_counter()
            self._write_checkpoint(job)
            new = race.race(
                group, lambda v: self._start(job, mode, v), self.plan, lambda lane: self._ask(job, mode, lane)
            )
            self._shorten_errors(new)
            rows += new
            self.longest = max(self.longest, time.perf_counter() - begin)
            alone = alone or self._alone(job, mode)
            facts = {"job": job, "mode": mode, "shape": shape.shape, "batch": shape.batch, "length": shape.length}
            checked = [{**facts, "alone_ms": alone, **row} for row in race.with_parity(rows)]
            self.record.put("train", [*done, *checked], *map(race.line_of, checked[-len(group) :]))

    def _shorten_errors(self, rows: list[dict[str, Any]]) -> None:
        """Leaves the first line of each error in its row; errors.txt gets all of it."""
        for row in rows:
            if "error" in row:
                with (self.args.out / "errors.txt").open("a") as file:
                    file.write(f"==== {row['variant']} of {row['group']}\n{row['error']}\n\n")
                row["error"] = row["error"].splitlines()[0][:300]

    def _alone(self, job: str, mode: str) -> float | None:
        """See limits.alone_ms; measured after the workers have ended."""
        if not torch.cuda.is_available():
            return None
        from benchmarks.limits import alone_ms

        found = alone_ms(job, mode)
        torch.cuda.empty_cache()
        return found

    def _write_checkpoint(self, job: str) -> None:
        write_apart(jobs.JOBS[job].shape, self.args.checkpoints)

    def _start(self, job: str, mode: str, variant: str) -> Worker:
        return Worker(variant, race.command_for(job, mode, variant, str(self.args.checkpoints), self.args.before))

    def _ask(self, job: str, mode: str, lane: race.Lane) -> None:
        if lane.row["variant"] != "hasten":
            return
        try:
            if self.args.profile and (job, mode) not in self.profiled:
                self.profiled.add((job, mode))
                profiled = lane.worker.ask(self.plan.turn_limit, "profile", wall_s=lane.row["ms"] / 1e3)
                with (self.args.out / "profiles.txt").open("a") as file:
                    file.write(f"==== {job}, hasten, {mode}\n{profiled['text']}\n\n")
                lane.row["profile"] = profiled["summary"]
            if not self.args.no_costs and f"{job} {mode}" not in self.costs:
                self.costs[f"{job} {mode}"] = lane.worker.ask(self.plan.turn_limit, "costs", lengths=LENGTHS)
        except WorkerFailed as error:
            lane.row["afterwards"] = str(error)


def measure(args: argparse.Namespace, record: Record, begin: float) -> bool:
    """Returns whether all races agree. args: as parsed by benchmarks.gpu."""
    if not args.no_costs:
        from benchmarks.step_costs import import_seconds

        seconds = import_seconds()
        record.put(
            "fixed_costs", {"import": seconds}, f"imports: { {name: round(s, 2) for name, s in seconds.items()} }"
        )
    return Training(args, record, begin).run()
