"""hasten's kernels under NVIDIA's compute-sanitizer: out-of-bounds accesses, races in shared memory, reads of unwritten memory.

    python -m benchmarks.gpu --out FOLDER --only sanitize [--tools memcheck,racecheck,initcheck] [--calls norms,...]
Each tool runs each entry of kernel_calls.CALLS in a process of its own, several at a time. memcheck and racecheck watch hasten's
kernels only. initcheck watches all, since it takes the output of an unwatched kernel for uninitialised memory.
"""

import argparse
import os
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Record
from benchmarks.harness.workers import module
from benchmarks.kernel_calls import CALLS
from benchmarks.kernels import launched_kernels

TOOLS = ("memcheck", "racecheck", "initcheck")
VERDICT = re.compile(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)$", re.M)
PLACE = re.compile(r"(?:^=+\s+|access )at (.+?)\+0x[0-9a-f]+", re.M)
SAID_DONE = "called "
AT_ONCE = 8
NOT_UNDER = {"racecheck": ("LoRA",)}
"""Entries that a tool cannot run: racecheck ends with an internal error on cuBLAS's matmuls between our kernels. Other entries
run the same kernels."""


def command_for(tool: str, kernels: list[str], calls: str) -> list[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # torch asks CUDA questions whose answer is an error
    if tool != "initcheck":
        for name in kernels:
            command += ["--kernel-name", f"kernel_substring={name}"]
    return [*command, *module("kernel_calls", calls)]


def judge(tool: str, kernels: list[str], code: int, text: str) -> dict[str, Any]:
    """{"tool", "clean", "verdict", "at", "ours"} from the tool's output.

    clean: the tool ran, the kernels ran to the end, and nothing was found in hasten's kernels. at: findings by kernel; ours:
    those in hasten's. verdict: the tool's summary, or its first lines without one.
    """
    found = VERDICT.findall(text)
    places = Counter(PLACE.findall(text))
    mine = {name: count for name, count in places.items() if any(one in name for one in kernels)}
    finished = any(line.startswith(SAID_DONE) for line in text.splitlines())
    verdict = found[-1][0] if found else " | ".join(text.strip().splitlines()[:6])
    nothing = bool(found) and (int(found[-1][1]) == 0 and code == 0 or (bool(places) and not mine))
    return {"tool": tool, "clean": finished and nothing, "verdict": verdict, "at": dict(places), "ours": mine}


def _run(tool: str, kernels: list[str], calls: str, limit_s: float) -> tuple[int, str]:
    """(exit code, output); a tool that is missing or takes too long has failed."""
    try:
        done = subprocess.run(
            command_for(tool, kernels, calls), capture_output=True, text=True, timeout=limit_s,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return 1, f"{type(error).__name__}: {error}"
    return done.returncode, done.stdout + done.stderr


def sanitize(tools: list[str], log: Path, calls: list[str] | None = None, limit_s: float = 170) -> list[dict[str, Any]]:
    """Runs each tool on each entry of CALLS (None = all) and returns one row each. log: gets the output of those not clean."""
    kernels = sorted(launched_kernels())
    pairs = [(tool, name) for tool in tools for name in (calls or CALLS) if name not in NOT_UNDER.get(tool, ())]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = list(pool.map(lambda pair: _run(pair[0], kernels, pair[1], limit_s), pairs))
    rows = []
    for (tool, name), (code, text) in zip(pairs, said, strict=True):
        rows.append(judge(tool, kernels, code, text) | {"calls": name})
        if not rows[-1]["clean"]:
            with log.open("a") as file:
                file.write(f"==== {tool}, {name}\n{text[:50_000]}\n")
    return rows


def run(args: argparse.Namespace, record: Record) -> bool:
    return record.rows("sanitize", sanitize(args.tools, args.out / "sanitize.txt", args.calls or None), "clean")
