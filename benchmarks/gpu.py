"""One call on a GPU machine: tests, op speeds, training steps beside the peers, curves, sanitizers; one JSON.

    python -m benchmarks.gpu --out FOLDER [--only tests,ops,train,curves,sanitize] [--jobs 8b-lora,...]
                             [--variants hasten,unsloth,liger,transformers,trl]
                             [--modes keep,recompute,offload,default,budget] [--profile] [--before FOLDER]
FOLDER gets results.json (see benchmarks/results.py; parts of several calls: python -m benchmarks.publish --merge), and where
there is something to say tests.txt, profiles.txt, errors.txt and sanitize.txt. Exits with 1 where a test, a library's parity with transformers or a sanitizer fails.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import jobs, race, results
from benchmarks.shapes import write_apart
from benchmarks.workers import Worker, WorkerFailed

PARTS = ("tests", "ops", "train", "curves", "sanitize")
LENGTHS = (2048, 2000, 1999, 1537)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="tests,ops,train", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--jobs", default=",".join(jobs.MEASURED))
    parser.add_argument("--variants", default="hasten,transformers,liger,unsloth", help="the first is in every group")
    parser.add_argument("--modes", default="keep,recompute")
    parser.add_argument("--profile", action="store_true", help="a profile of one step of hasten per job and mode")
    parser.add_argument("--no-costs", action="store_true", help="leave out host waits and new lengths")
    parser.add_argument(
        "--load-alone", action="store_true", help="workers load one by one, so that load times are clean"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--minutes", type=float, default=9.5, help="start no group of libraries that would end later")
    parser.add_argument("--room", type=float, help="GiB that a group may take; default: 94 %% of the card")
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "checkpoints")
    parser.add_argument("--before", type=Path, help="source tree whose hasten the variant hasten-before imports")
    args = parser.parse_args(arguments)
    for name, known in (("only", PARTS), ("jobs", jobs.JOBS), ("variants", jobs.VARIANTS), ("modes", jobs.MODES)):
        asked = getattr(args, name).split(",")
        if unknown := [one for one in asked if one not in known]:
            parser.error(f"--{name}: no such {', '.join(unknown)}; there are {', '.join(known)}")
        setattr(args, name, asked)
    if (jobs.BEFORE in args.variants) != (args.before is not None):
        parser.error(f"--variants {jobs.BEFORE} and --before FOLDER go together")
    if args.before is not None and not (args.before / "hasten/__init__.py").exists():
        parser.error(f"--before: {args.before} must be a folder with a package hasten in it")
    return args


def run_tests(out: Path) -> tuple[str, bool]:
    """(pytest's last line, whether all passed)."""
    command = [sys.executable, "-m", "pytest", "tests/ops", "tests/families/test_kernels.py", "-q", "-x"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True)
    (out / "tests.txt").write_text(done.stdout[-20000:] + done.stderr[-4000:])
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    return last, done.returncode == 0


class Training:
    """The races of all jobs and modes, and what only hasten is asked for."""

    def __init__(self, args: argparse.Namespace, result: dict[str, Any], begin: float) -> None:
        self.args, self.result, self.begin = args, result, begin
        self.plan = race.Plan(rounds=args.rounds, steps=args.steps, load_alone=args.load_alone)
        self.longest, self.profiled = 0.0, set[tuple[str, str]]()
        result["train"], result["left_out"] = [], []
        self.costs = result.setdefault("fixed_costs", {})
        self.alone: dict[tuple[str, str], float] = {}

    def room_gib(self) -> float:
        return self.args.room or torch.cuda.get_device_properties(0).total_memory / jobs.GIB * 0.94

    def run(self) -> bool:
        """Whether every library that came through agrees with transformers."""
        for job in self.args.jobs:
            for mode in self.args.modes:
                self._run(job, mode)
        for line in self.result["left_out"]:
            print(f"left out, no time: {line}", flush=True)
        return all(row.get("parity", {}).get("ok", True) for row in self.result["train"])

    def _run(self, job: str, mode: str) -> None:
        rows: list[dict[str, Any]] = []
        done = self.result["train"]
        for group in race.groups(job, mode, self.args.variants, self.room_gib()):
            if time.perf_counter() - self.begin + self.longest > self.args.minutes * 60:
                self.result["left_out"].append(f"{job} {mode} {'+'.join(group)}")
                continue
            begin = time.perf_counter()
            self._write_checkpoint(job)
            rows += self._with_short_errors(
                race.race(
                    group, lambda v: self._start(job, mode, v), self.plan, lambda lane: self._ask(job, mode, lane)
                )
            )
            self.longest = max(self.longest, time.perf_counter() - begin)
            shape = jobs.JOBS[job]
            facts = {"job": job, "mode": mode, "shape": shape.shape, "batch": shape.batch, "length": shape.length}
            facts["alone_ms"] = self._alone(job, mode)
            checked = [{**facts, **row} for row in race.with_parity(rows)]
            self.result["train"] = [*done, *checked]
            results.write(self.result, self.args.out / "results.json")
            for row in checked[-len(group) :]:
                print(line_of(row), flush=True)

    def _with_short_errors(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with the first line of each error; all of it goes to errors.txt."""
        for row in rows:
            if "error" in row:
                with (self.args.out / "errors.txt").open("a") as file:
                    file.write(f"==== {row['variant']} of {row['group']}\n{row['error']}\n\n")
                row["error"] = row["error"].splitlines()[0][:300]
        return rows

    def _alone(self, job: str, mode: str) -> float | None:
        """See benchmarks/alone.py; measured once a job and mode, beside no worker."""
        if not torch.cuda.is_available():
            return None
        if (job, mode) not in self.alone:
            from benchmarks.alone import alone_ms

            self.alone[job, mode] = alone_ms(job, mode)
            torch.cuda.empty_cache()
        return self.alone[job, mode]

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


def line_of(row: dict[str, Any]) -> str:
    """One printed line: figures only of a row whose losses agree."""
    name = f"{row['job']} {row['mode']} {row['variant']}"
    if "error" in row:
        return f"{name:36s} ERROR {row['error'].splitlines()[0]}"
    parity = row.get("parity", {})
    if "ms" not in row:
        return f"{name:36s} PARITY FAILED: {parity['worst']:.2e} from {parity['against']} at step {parity['step']}"
    agreed = f"within {parity['worst']:.1e} of {parity['against']}" if parity.get("against") else ""
    if before := row.get("before"):
        spread = f"{min(before['rounds']):.4f} to {max(before['rounds']):.4f} by round"
        gradients = "-" if before["gradients"] is None else f"{before['gradients']:.1e}"
        agreed += (
            f"\n{'':36s} {before['ratio']:.4f} of the time before ({spread}), {before['peak_gib']:+.2f} GiB, "
            f"losses within {before['worst']:.1e}, gradients {gradients}"
        )
    return (
        f"{name:36s} {row['ms']:7.1f} ms ({row['min_ms']:.1f} to {row['max_ms']:.1f})  {row['peak_gib']:5.1f} GiB  "
        f"first {row['first_step_s']:.1f} s  load {row['load_s']:.1f} s  "
        f"loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}  {agreed}"
    )


def run_ops(result: dict[str, Any]) -> None:
    from benchmarks import ceilings, op_speed
    from benchmarks.tables import op_line

    result["ceilings"] = ceilings.measure()
    print({name: f"{rate / 1e12:.1f} T/s" for name, rate in result["ceilings"].items() if isinstance(rate, float)})
    result["ops"] = op_speed.measure()
    for row in result["ops"]:
        print(op_line(row, result["ceilings"]), flush=True)
    torch.cuda.empty_cache()


def run_training(args: argparse.Namespace, result: dict[str, Any], begin: float) -> bool:
    if not args.no_costs:
        from benchmarks.fixed_costs import import_seconds

        result["fixed_costs"] = {"import": import_seconds()}
        print("imports:", {name: round(seconds, 2) for name, seconds in result["fixed_costs"]["import"].items()})
    return Training(args, result, begin).run()


def run_curves(result: dict[str, Any]) -> None:
    from benchmarks.curves import measure_all, say

    result["curves"] = measure_all()
    print("\n".join(say(result["curves"])), flush=True)


def run_sanitizers(result: dict[str, Any], out: Path) -> bool:
    from benchmarks import sanitize

    result["sanitize"] = sanitize.sanitize(list(sanitize.TOOLS), out / "sanitize.txt")
    print("\n".join(sanitize.line_of(row) for row in result["sanitize"]), flush=True)
    return all(row["clean"] for row in result["sanitize"])


def main(arguments: list[str]) -> int:
    args, begin, sound = parse(arguments), time.perf_counter(), True
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "versions": results.versions()}
    for part in (one for one in PARTS if one in args.only):
        if part == "tests":
            result["tests"], passed = run_tests(args.out)
            print("tests:", result["tests"], flush=True)
            sound = sound and passed
        elif part == "ops":
            run_ops(result)
        elif part == "train":
            sound = run_training(args, result, begin) and sound
        elif part == "curves":
            run_curves(result)
        else:
            sound = run_sanitizers(result, args.out) and sound
        results.write(result, args.out / "results.json")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
