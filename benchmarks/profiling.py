"""One profiled step: torch's own table, and where the device's time goes by kind of work."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels import launched_kernels

KINDS = [
    ("memory copies", re.compile(r"^(Memcpy|Memset)", re.I)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention", re.I)),
    ("products", re.compile(r"gemm|nvjet|cublas|cutlass|xmma|gemv|splitk|dot_kernel", re.I)),
    ("optimizer", re.compile(r"multi_tensor|fused_adam", re.I)),
]
Span = tuple[str, float, float]
"""(name, start, end) of something that ran on the device, microseconds."""


def kind_of(name: str, ours: Iterable[str]) -> str:
    """hasten's kernels by their own names; the rest by what the name tells, else "elementwise and other"."""
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


def profile_step(step: Callable[[], Any], wall_s: float) -> dict[str, Any]:
    """{"text", "summary"} of one step. wall_s: seconds of a step without the profiler, from which idle time is told."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events() or []
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    summary = summarise(spans, wall_s, launched_kernels())
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    return {"text": f"{as_text(summary)}\n{table}", "summary": summary}
