"""One call on a GPU machine: tests, ops, training steps of all libraries, memory, packing, curves, sanitizers; one JSON.

    python -m benchmarks.gpu --out FOLDER [--only tests,ops,train,budget,longest,packing,curves,sanitize]
                             [--jobs 8b-lora,...] [--variants hasten,unsloth,liger,transformers,trl] [--profile]
                             [--modes keep,recompute,offload,default,budget]
    python -m benchmarks.gpu --out FOLDER --only train --variants hasten,hasten-before --before TREE
races this hasten against the package of another checkout, TREE/hasten. A part's own file says what its options mean.
FOLDER gets results.json (see harness/results.py; to merge several calls: python -m benchmarks.publish --merge), and if there is
something to report tests.txt, profiles.txt, errors.txt and sanitize.txt. Exits with 1 if a test, parity of losses or gradients, a
budget or a sanitizer fails.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from benchmarks.harness import jobs
from benchmarks.harness.results import Record

PARTS = ("tests", "ops", "train", "budget", "longest", "packing", "curves", "sanitize")
"""In the order in which they run. All but "tests" are modules with a function run(args, record) -> whether all is well."""


def tests(args: argparse.Namespace, record: Record) -> bool:
    command = [sys.executable, "-m", "pytest", "tests/ops", "tests/families/test_kernels.py", "-q", "-x"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True)
    (args.out / "tests.txt").write_text(done.stdout[-20000:] + done.stderr[-4000:])
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    record.put("tests", last, f"tests: {last}")
    return done.returncode == 0


def _options() -> argparse.ArgumentParser:
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
    parser.add_argument("--points", default="", help="of longest: CAP in GiB:TOKENS,..., run in this order")
    parser.add_argument("--series", default="", help="of longest: TOKENS,..., without a cap")
    parser.add_argument("--shape", default="llama-8b", choices=sorted(jobs.SHAPES), help="of longest")
    parser.add_argument("--offload-embedding", action="store_true", help="of longest: the embedding in CPU memory")
    parser.add_argument("--tools", default="memcheck,racecheck,initcheck", help="of the sanitizers")
    parser.add_argument("--calls", default="", help="of the sanitizers: names in kernel_calls.py; default: all")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = _options()
    args = parser.parse_args(arguments)
    for name, known in (("only", PARTS), ("jobs", jobs.JOBS), ("variants", jobs.VARIANTS), ("modes", jobs.MODES)):
        asked = getattr(args, name).split(",")
        if unknown := [one for one in asked if one not in known]:
            parser.error(f"--{name}: no such {', '.join(unknown)}; choose from {', '.join(known)}")
        setattr(args, name, asked)
    for name in ("points", "series", "tools", "calls"):
        setattr(args, name, [one for one in getattr(args, name).split(",") if one])
    if (jobs.BEFORE in args.variants) != (args.before is not None):
        parser.error(f"--variants {jobs.BEFORE} and --before FOLDER go together")
    if args.before is not None and not (args.before / "hasten/__init__.py").exists():
        parser.error(f"--before: {args.before} must be a folder with a package hasten in it")
    if "longest" in args.only and (len(args.variants) > 1 or not (args.points or args.series)):
        parser.error("--only longest: pass one of --variants, and --points or --series")
    if args.series and args.variants != ["hasten"]:
        parser.error('--series runs with hasten\'s "offload": pass --variants hasten')
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / "results.json")
    sound = True
    for part in (part for part in PARTS if part in args.only):
        run = tests if part == "tests" else import_module(f"benchmarks.{part}").run
        sound = run(args, record) and sound
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
