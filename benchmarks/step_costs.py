"""Where a step's time goes: kinds of kernels, idle time, host waits, compilations at new lengths, imports."""

import json
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.steps import Steps, wait
from benchmarks.harness.timing import DEVICE
from benchmarks.kernels import launched_kernels

ROOT = Path(__file__).parent.parent
KINDS = [
    ("memory copies", re.compile(r"^(Memcpy|Memset)", re.I)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention", re.I)),
    ("matmuls", re.compile(r"gemm|nvjet|cublas|cutlass|xmma|gemv|splitk|dot_kernel", re.I)),
    ("optimizer", re.compile(r"multi_tensor|fused_adam", re.I)),
]
IMPORTS = {
    "torch": "import torch",
    "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel",
    "peft": "import peft",
    "hasten": "from hasten import FastLanguageModel",
}
Span = tuple[str, float, float]
"""(name, start, end) of a kernel or copy on the device, in microseconds."""


def kind_of(name: str, ours: Iterable[str]) -> str:
    """hasten's kernels by their own names, others by KINDS, else "elementwise and other"."""
    if name in ours:
        return name
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "elementwise and other")


def busy_us(spans: Iterable[Span]) -> float:
    """Microseconds during which at least one of `spans` runs."""
    total, reached = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarise(spans: list[Span], wall_s: float, ours: Iterable[str]) -> dict[str, Any]:
    """{"wall_ms", "busy_ms", "idle_ms", "kinds": {kind: {"ms", "calls"}}}, the largest kind first. wall_s: of an unprofiled step."""
    ours = set(ours)
    kinds: dict[str, dict[str, float]] = {}
    for name, start, end in spans:
        entry = kinds.setdefault(kind_of(name, ours), {"ms": 0.0, "calls": 0})
        entry["ms"] += (end - start) / 1e3
        entry["calls"] += 1
    busy = busy_us(spans) / 1e3
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"]))
    return {"wall_ms": wall_s * 1e3, "busy_ms": busy, "idle_ms": wall_s * 1e3 - busy, "kinds": ordered}


def as_text(summary: dict[str, Any]) -> str:
    lines = [f"wall {summary['wall_ms']:.1f} ms, busy {summary['busy_ms']:.1f}, idle {summary['idle_ms']:.1f}"]
    lines += [f"  {entry['ms']:8.2f} ms {entry['calls']:6.0f} x  {kind}" for kind, entry in summary["kinds"].items()]
    return "\n".join(lines)


def profile_step(steps: Steps, wall_s: float) -> dict[str, Any]:
    """{"text", "summary"} of one step. wall_s: seconds of a step without the profiler, for the idle time."""
    ids = steps.batch()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]) as recorded:
        steps.take(ids)
        wait()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    summary = summarise(spans, wall_s, launched_kernels())
    table = recorded.key_averages().table(f"self_{DEVICE}_time_total", row_limit=60, max_name_column_width=90)
    return {"text": f"{as_text(summary)}\n{table}", "summary": summary}


def host_waits(steps: Steps) -> dict[str, Any]:
    """{"count", "where"}: how often, and at which lines, one step makes the host wait for the device.

    The inputs are on the device already. Counted by `torch.cuda.set_sync_debug_mode`; 0 without a GPU.
    """
    ids = steps.batch()
    steps.take(ids)
    if DEVICE != "cuda":
        return {"count": 0, "where": []}
    wait()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            steps.take(ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in seen if "synchronizing CUDA operation" in str(one.message)]
    return {"count": len(waits), "where": sorted({_place(one.filename, one.lineno) for one in waits})}


def _place(file: str, line: int) -> str:
    """file:line, relative to this repository or to the folder of packages that holds it."""
    path = Path(file)
    roots = [one for one in path.parents if one.name.endswith("-packages") or one == ROOT]
    return f"{path.relative_to(roots[0]) if roots else Path(*path.parts[-3:])}:{line}"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the names of the Triton kernels that this process compiles (or reads from the disk cache) in the block."""
    from triton import knobs

    names: list[str] = []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **told: names.append(told["fn"].name)
        yield names


def new_lengths(steps: Steps, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """For each length in turn: {"length", "compiled", "first_ms", "second_ms"} of its first two steps."""
    rows = []
    for length in lengths:
        with compilations() as compiled:
            first, _ = steps.timed(steps.batch(length))
        second, _ = steps.timed(steps.batch(length))
        spent = {"first_ms": first * 1e3, "second_ms": second * 1e3}
        rows.append({"length": length, "compiled": sorted(compiled), **spent})
    return rows


def costs(steps: Steps, lengths: Sequence[int]) -> dict[str, Any]:
    """{"lengths": of `new_lengths`, "host_waits": of `host_waits`}, taken in this order."""
    return {"lengths": new_lengths(steps, lengths), "host_waits": host_waits(steps)}


def import_seconds(repeats: int = 3) -> dict[str, float]:
    """Median seconds of each of IMPORTS beyond the ones before it, in fresh processes."""
    marks = [f"{line}\nmarks.append(time.perf_counter())" for line in IMPORTS.values()]
    program = "\n".join(["import json, time", "marks = [time.perf_counter()]", *marks, "print(json.dumps(marks))"])
    taken: list[list[float]] = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seen = json.loads(done.stdout.splitlines()[-1])
        taken.append([after - before for before, after in pairwise(seen)])
    return {name: statistics.median(run[i] for run in taken) for i, name in enumerate(IMPORTS)}
