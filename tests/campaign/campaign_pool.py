"""Runs each case in a forked process with limits of time and memory, two at a time, and keeps every result as a line of JSON.

The parent only forks: it starts no threads and never trains, so that a fork is as good as a fresh process.
"""

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hasten.errors import HastenError

GOOD = ("refused", "no effect", "as stock", "reported", "whole", "resumed", "flat")
BAD = ("raw exception", "hang", "silent difference", "crash")
ADDRESS_SPACE = 8 * 2**30
"""Bytes: far more than a tiny model needs; a file that asks for more must be refused before anything is allocated."""


@dataclass(frozen=True)
class Case:
    """group: of the table. seed: with the group, all that decides what is done. seconds: the time limit."""

    group: str
    seed: int
    seconds: float

    @property
    def key(self) -> str:
        return f"{self.group}/{self.seed}"


@dataclass(frozen=True)
class Result:
    """outcome: one of `GOOD` or `BAD`. what: what was done. detail: error, or where the difference is."""

    key: str
    outcome: str
    what: str = ""
    detail: str = ""
    seconds: float = 0.0


Judge = Callable[[int, Path], tuple[str, str, str]]
"""(seed, empty folder) -> (outcome, what was done, detail)."""


def run_case(case: Case, judge: Judge, scratch: Path) -> Result:
    """In the forked process: a typed error is a refusal, any other exception is a violation."""
    started = time.monotonic()
    what = scratch / "what.txt"  # a judge says here what it did, for cases that end with an exception
    try:
        outcome, done, detail = judge(case.seed, scratch)
    except HastenError as error:  # right for a file that was changed, and wrong for one that was not
        outcome = "raw exception" if case.group.startswith("kill") else "refused"
        done, detail = said(what), f"{type(error).__name__}: {error}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        outcome, done, detail = "raw exception", said(what), f"{type(error).__name__}: {error} ({where})"
        if isinstance(error, KeyboardInterrupt):
            raise
    return Result(case.key, outcome, done, detail[:400], round(time.monotonic() - started, 2))


def said(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _child(case: Case, judge: Judge, scratch: Path) -> None:
    """Never returns: the copy of the parent must not go on with the parent's work."""
    code = 1
    try:
        os.setsid()  # what it starts ends with it
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        result = run_case(case, judge, scratch)
        (scratch / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")
        code = 0
    finally:
        os._exit(code)


def run_all(cases: Iterable[Case], judge_of: Callable[[Case], Judge], workers: int = 2) -> Iterator[Result]:
    """The results, in the order in which they come."""
    waiting = list(cases)[::-1]
    running: dict[int, tuple[Case, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            case = waiting.pop()
            scratch = Path(tempfile.mkdtemp(prefix="campaign-"))
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                _child(case, judge_of(case), scratch)
            running[child] = (case, scratch, time.monotonic() + case.seconds)
        time.sleep(0.01)
        for child, (case, scratch, deadline) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() < deadline:
                continue
            if not done:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
            del running[child]
            yield _result(case, scratch, bool(done), status)
            shutil.rmtree(scratch, ignore_errors=True)


def _result(case: Case, scratch: Path, ended: bool, status: int) -> Result:
    written = scratch / "result.json"
    if written.exists():
        return Result(**json.loads(written.read_text(encoding="utf-8")))
    what = said(scratch / "what.txt")
    if not ended:
        return Result(case.key, "hang", what, f"more than {case.seconds:.0f} s", case.seconds)
    return Result(case.key, "crash", what, f"ended with status {os.waitstatus_to_exitcode(status)}")
