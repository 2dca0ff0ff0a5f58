"""The longest sequence that an 8B QLoRA step (r=32, one sequence) fits under a cap of GPU memory, and how the peak grows with it.

    python -m benchmarks.gpu --out FOLDER --only longest --variants hasten --points 24:163840,8:16384 [--offload-embedding]
    python -m benchmarks.gpu --out FOLDER --only longest --variants hasten --series 8192,16384,32768,65536
    python -m benchmarks.longest 24 48           the longest sequences under these caps, as the planner expects; takes no step
A point is CAP in GiB : tokens. The model is loaded once and the optimizer's state stays; each point is one whole step: forward,
backward, fused AdamW. A cap is the most that nvidia-smi may show of the process: torch's allocator gets the cap less the CUDA
context (harness/card.py), hasten's "auto" a RESERVE less than that, for fragmentation. Other libraries run their default
checkpointing. A series runs with "offload" and no cap. Best under PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which a row
records.
"""

import argparse
import math
import os
import statistics
import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import steps as training
from benchmarks.harness.card import Card
from benchmarks.harness.checkpoints import config_of, write_apart
from benchmarks.harness.jobs import GIB, Job
from benchmarks.harness.results import Record
from benchmarks.harness.steps import Steps, peaks, reset_peaks
from benchmarks.harness.timing import DEVICE

RANK = 32
RESERVE = 0.02
"""Share of the allocator's memory that hasten is not told of: pieces too small to be of use."""
WARM_LENGTH = 4096
"""Tokens of the short steps that compile the kernels: more than one MLP tile."""
GRAIN, LONGEST = 1024, 2**24
"""Resolution and end of a search, in tokens."""
CONTEXT_GIB = 0.75
"""CUDA context with all kernels, as a search assumes it."""
NO_MEMORY = ("out of memory", "GPU memory available")
"""Parts of error messages about too little memory, torch's and those of libraries that check what is free."""
Point = tuple[float | None, int]
"""(cap in GiB or None, tokens)."""


def job_of(shape: str, longest: int, offload_embedding: bool = False) -> Job:
    title = f"{shape}, QLoRA r={RANK}, one sequence"
    return Job(title, shape, "qlora", 1, longest, rank=RANK, offload_embedding=offload_embedding)


def load(variant: str, job: Job, checkpoints: Path) -> Steps:
    """Loads the model with its adapter, for sequences up to the job's length."""
    write_apart(job.shape, checkpoints)
    return training.load(variant, job, "default", checkpoints)[1]


def switch(steps: Steps, mode: str, budget: int | None = None) -> None:
    """Sets hasten's checkpointing; other libraries keep theirs."""
    if steps.variant == "hasten":
        from hasten.training import checkpointing

        checkpointing.enable(steps.model, mode, budget)


def warm(steps: Steps) -> None:
    """Compiles the kernels of steps that save as little as possible and of steps that save everything."""
    for budget in (1, None):
        switch(steps, "auto", budget)
        steps.timed(steps.batch(min(WARM_LENGTH, steps.job.length)))


def one_point(steps: Steps, card: Card, point: Point) -> dict[str, Any]:
    """Takes one step. Returns {"variant", "cap_gib", "length", "offload_embedding", "context_gib", "ok", "peak_gib",
    "reserved_gib", "predicted_gib", "seconds", "loss", "plan", "error", "allocator"}."""
    cap, length = point
    allowed = card.cap(cap)
    switch(steps, "offload" if cap is None else "auto", None if allowed is None else int(allowed * (1 - RESERVE)))
    reset_peaks(empty_cache=True)
    row = {"variant": steps.variant, "cap_gib": cap, "length": length, "context_gib": card.context / GIB}
    row |= {"offload_embedding": steps.job.offload_embedding}
    row |= {"ok": False, "seconds": None, "loss": None, "error": None, "plan": None, "predicted_gib": None}
    try:
        seconds, loss = steps.timed(steps.batch(length))
        row |= {"ok": math.isfinite(float(loss)), "seconds": seconds, "loss": float(loss)}
        row["error"] = None if row["ok"] else "the loss is not finite"
    except RuntimeError as error:
        if not any(said in str(error) for said in NO_MEMORY):
            raise
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        steps.optimizer.zero_grad(set_to_none=True)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    allocator = next((os.environ[name] for name in names if name in os.environ), None)
    return {**row, **peaks(), "allocator": allocator, **steps.planned(length)}


def linearity(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Fits a line to the peaks of a series by least squares; None for fewer than three rows that succeeded.

    {"gib_at_zero", "gib_per_1024", "residual_gib", "residual_share": largest distance from it, and over its peak, "rows"}.
    """
    sound = [(row["length"], row["peak_gib"]) for row in found if row["ok"] and row["cap_gib"] is None]
    if len(sound) < 3:
        return None
    slope, start = statistics.linear_regression(*zip(*sound, strict=True))
    off = [(abs(peak - start - slope * length), peak) for length, peak in sound]
    share = max(distance / peak if peak else 0.0 for distance, peak in off)
    return {"gib_at_zero": start, "gib_per_1024": slope * 1024, "residual_gib": max(off)[0], "residual_share": share,
            "rows": len(sound)}  # fmt: skip


def search(job: Job, cap: float, host_gib: float | None = None) -> dict[str, Any]:
    """{"cap_gib", "length", "predicted_gib", "plan"}: the longest sequence, a multiple of GRAIN, for which the planner finds a plan; length
    0 if not even GRAIN tokens fit. host_gib: pinned CPU memory to assume, None = the policy's limit on this machine."""
    import psutil

    from hasten.estimation import ASSUMED
    from hasten.training.memory.bandwidth import measure
    from hasten.training.memory.plan import LayerPlan, plan_layers
    from hasten.training.memory.planner import MARGIN, MAX_PINNED_FRACTION
    from hasten.training.memory.shape import ModelShape

    shape = ModelShape.of_config(config_of(job.shape), job.rank, "4bit", offload_embedding=job.offload_embedding)
    budget = int((cap - CONTEXT_GIB) * GIB * (1 - RESERVE) * (1 - MARGIN))
    speed = measure(torch.device(DEVICE)) or ASSUMED
    room = int(psutil.virtual_memory().available * MAX_PINNED_FRACTION) if host_gib is None else int(host_gib * GIB)

    def plan(length: int) -> LayerPlan:
        return plan_layers(shape, 1, length, budget, speed, max_pinned=room)

    lengths = range(GRAIN, LONGEST, GRAIN)
    fitting = bisect_left(lengths, True, key=lambda length: not plan(length).fits)
    best = plan(lengths[fitting - 1]) if fitting else None
    predicted = None if best is None else best.peak.total / GIB
    return {"cap_gib": cap, "length": fitting * GRAIN, "predicted_gib": predicted, "plan": str(best)}


def run(args: argparse.Namespace, record: Record) -> bool:
    """Returns True whatever fits: a failure under a cap is a result."""
    pairs = (point.split(":") for point in args.points)
    points: list[Point] = [(float(cap), int(length)) for cap, length in pairs]
    points += [(None, int(length)) for length in args.series]
    job = job_of(args.shape, max(length for _, length in points), args.offload_embedding)
    steps = load(args.variants[0], job, args.checkpoints)
    warm(steps)
    with Card() as card:
        record.rows("longest", (one_point(steps, card, point) for point in points))
    if (fit := linearity(record.result["longest"])) is not None:
        record.put("linearity", fit, str(fit))
    return True


if __name__ == "__main__":
    for cap in sys.argv[1:]:
        print(search(job_of("llama-8b", GRAIN), float(cap)), flush=True)
