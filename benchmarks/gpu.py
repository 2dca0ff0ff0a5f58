"""One call on a GPU machine: tests, ops, training steps of all libraries, budgets, packing, curves, sanitizers; one JSON.

    python -m benchmarks.gpu --out FOLDER [--only tests,ops,train,budget,packing,curves,sanitize] [--jobs 8b-lora,...]
                             [--variants hasten,unsloth,liger,transformers,trl] [--profile]
                             [--modes keep,recompute,offload,default,budget]
    python -m benchmarks.gpu --out FOLDER --only train --variants hasten,hasten-before --before TREE
races this hasten against the package of another checkout, TREE/hasten. Sequence lengths under a cap: python -m benchmarks.longest.
FOLDER gets results.json (see harness/results.py; to merge several calls: python -m benchmarks.publish --merge), and if there is
something to report tests.txt, profiles.txt, errors.txt and sanitize.txt. Exits with 1 if a test, parity of losses or gradients, a
budget or a sanitizer fails.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import jobs
from benchmarks.harness.results import Record


@dataclass(frozen=True)
class Call:
    """The arguments, the result so far, and when the call began."""

    args: argparse.Namespace
    record: Record
    begin: float


def _tests(call: Call) -> bool:
    command = [sys.executable, "-m", "pytest", "tests/ops", "tests/families/test_kernels.py", "-q", "-x"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True)
    (call.args.out / "tests.txt").write_text(done.stdout[-20000:] + done.stderr[-4000:])
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    call.record.put("tests", last, f"tests: {last}")
    return done.returncode == 0


def _ops(call: Call) -> bool:
    import torch

    from benchmarks import limits, ops
    from benchmarks.tables import op_line

    ceilings = limits.measure()
    rates = {name: f"{rate / 1e12:.1f} T/s" for name, rate in ceilings.items() if isinstance(rate, float)}
    call.record.put("ceilings", ceilings, str(rates))
    rows = ops.measure()
    call.record.put("ops", rows, *(op_line(row, ceilings) for row in rows))
    torch.cuda.empty_cache()
    return True


def _train(call: Call) -> bool:
    from benchmarks import train

    return train.measure(call.args, call.record, call.begin)


def _budget(call: Call) -> bool:
    from benchmarks import budget

    rows = (row for job in call.args.jobs for row in budget.measure(job, call.args.checkpoints))
    return call.record.rows("budget", rows, budget.line_of, "ok")


def _packing(call: Call) -> bool:
    from benchmarks import packing

    found = packing.measure(packing.Setting(), call.args.checkpoints)
    call.record.put("packing", found, *packing.say(found))
    return all("ms" in row for row in found["ways"])


def _curves(call: Call) -> bool:
    from benchmarks import curves

    found = curves.measure_all()
    call.record.put("curves", found, *curves.say(found))
    return True


def _sanitize(call: Call) -> bool:
    from benchmarks import sanitize

    rows = sanitize.sanitize(call.args.tools.split(","), call.args.out / "sanitize.txt", call.args.calls)
    return call.record.rows("sanitize", rows, sanitize.line_of, "clean")


PARTS: dict[str, Callable[[Call], bool]] = {
    "tests": _tests, "ops": _ops, "train": _train, "budget": _budget, "packing": _packing, "curves": _curves,
    "sanitize": _sanitize,
}  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="tests,ops,train", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--jobs", default=",".join(jobs.MEASURED))
    parser.add_argument("--variants", default="hasten,transformers,liger,unsloth", help="the first is in every group")
    parser.add_argument("--modes", default="keep,recompute")
    parser.add_argument("--profile", action="store_true", help="profile one step of hasten per job and mode")
    parser.add_argument("--no-costs", action="store_true", help="leave out imports, host waits and new lengths")
    parser.add_argument("--load-alone", action="store_true", help="load workers one by one, for clean load times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a turn")
    parser.add_argument("--minutes", type=float, default=9.5, help="start no group of libraries that would end later")
    parser.add_argument("--room", type=float, help="GiB that a group may take; default: 94 %% of the GPU")
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "checkpoints")
    parser.add_argument("--before", type=Path, help="source tree whose hasten the variant hasten-before imports")
    parser.add_argument("--tools", default="memcheck,racecheck,initcheck", help="of the sanitizers")
    parser.add_argument(
        "--calls", type=lambda text: text.split(","), help="of benchmarks/kernel_calls.py; default: all"
    )
    args = parser.parse_args(arguments)
    for name, known in (("only", PARTS), ("jobs", jobs.JOBS), ("variants", jobs.VARIANTS), ("modes", jobs.MODES)):
        asked = getattr(args, name).split(",")
        if unknown := [one for one in asked if one not in known]:
            parser.error(f"--{name}: no such {', '.join(unknown)}; choose from {', '.join(known)}")
        setattr(args, name, asked)
    if (jobs.BEFORE in args.variants) != (args.before is not None):
        parser.error(f"--variants {jobs.BEFORE} and --before FOLDER go together")
    if args.before is not None and not (args.before / "hasten/__init__.py").exists():
        parser.error(f"--before: {args.before} must be a folder with a package hasten in it")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    call = Call(args, Record(args.out / "results.json"), time.perf_counter())
    sound = [measure(call) for part, measure in PARTS.items() if part in args.only]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
