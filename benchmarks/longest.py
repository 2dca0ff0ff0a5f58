"""The longest sequence that an 8B QLoRA step (r=32, one sequence) fits under a cap of GPU memory, and how the peak grows with it.

    python -m benchmarks.longest --out FOLDER --checkpoints FOLDER --points 24:163840,8:16384 [--variant unsloth]
    python -m benchmarks.longest --out FOLDER --checkpoints FOLDER --series 8192,16384,32768,65536
    python -m benchmarks.longest --search 24,48                        what the planner expects to fit; takes no step
    ... --offload-embedding                                            any of these with the embedding in CPU memory
Writes FOLDER/longest-VARIANT.json (-offload.json with --offload-embedding). A point is CAP in GiB : tokens. The model is loaded once
and the optimizer's state stays; each point is one whole step: forward, backward, fused AdamW. A cap is the most that nvidia-smi
may show of the process: torch's allocator gets the cap less the CUDA context (harness/card.py), hasten's "auto" a RESERVE less
than that, for fragmentation. Other libraries run their default checkpointing. A series runs with "offload" and no cap. Best under
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which a row records.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import steps as training
from benchmarks.harness.card import Card
from benchmarks.harness.checkpoints import config_of, write_apart
from benchmarks.harness.jobs import GIB, SHAPES, VARIANTS, Job
from benchmarks.harness.results import Record
from benchmarks.harness.steps import DEVICE, Steps, peaks, reset_peaks

RANK = 32
RESERVE = 0.02
"""Share of the allocator's memory that hasten is not told of: pieces too small to be of use."""
WARM_LENGTH = 4096
"""Tokens of the short steps that compile the kernels: more than one MLP tile."""
GRAIN = 1024
"""Resolution of a search, in tokens."""
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
    """Takes one step. Returns its row, see `rows`."""
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


def rows(variant: str, job: Job, points: Sequence[Point], checkpoints: Path) -> Iterator[dict[str, Any]]:
    """Yields for each point {"variant", "cap_gib", "length", "offload_embedding", "context_gib", "ok", "peak_gib", "reserved_gib",
    "predicted_gib", "seconds", "loss", "plan", "error", "allocator"}."""
    steps = load(variant, job, checkpoints)
    warm(steps)
    with Card() as card:
        for point in points:
            yield one_point(steps, card, point)


def linearity(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Fits a line to the peaks of a series by least squares; None for fewer than three rows that succeeded.

    {"gib_at_zero", "gib_per_1024", "residual_gib", "residual_share": largest distance from it, and over its peak, "rows"}.
    """
    sound = [row for row in found if row["ok"] and row["cap_gib"] is None]
    if len(sound) < 3:
        return None
    lengths, taken = [row["length"] for row in sound], [row["peak_gib"] for row in sound]
    slope, start = statistics.linear_regression(lengths, taken)
    off = [abs(peak - start - slope * length) for length, peak in zip(lengths, taken, strict=True)]
    share = max(one / peak if peak else 0.0 for one, peak in zip(off, taken, strict=True))
    return {"gib_at_zero": start, "gib_per_1024": slope * 1024, "residual_gib": max(off), "residual_share": share,
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

    def plan(grains: int) -> LayerPlan:
        return plan_layers(shape, 1, grains * GRAIN, budget, speed, max_pinned=room)

    low, high = 0, 1
    while plan(high).fits:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan(middle).fits else (low, middle)
    best = plan(low) if low else None
    predicted = None if best is None else best.peak.total / GIB
    return {"cap_gib": cap, "length": low * GRAIN, "predicted_gib": predicted, "plan": str(best)}


def line_of(row: Mapping[str, Any]) -> str:
    cap = "no cap" if row["cap_gib"] is None else f"{row['cap_gib']:g} GiB"
    predicted = "" if row["predicted_gib"] is None else f", predicted {row['predicted_gib']:.2f}"
    came = f"{row['seconds']:.2f} s, loss {row['loss']:.4f}" if row["ok"] else f"FAILS {row['error']}"
    where = ", embedding in CPU memory" if row["offload_embedding"] else ""
    return (
        f"{row['variant']}{where} {cap:8s} {row['length']:8d} tokens  allocated {row['peak_gib']:.2f} GiB{predicted}, reserved "
        f"{row['reserved_gib']:.2f}, context {row['context_gib']:.2f}  {came}  {row['plan'] or ''}"
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--points", help="CAP:TOKENS,..., run in this order")
    parser.add_argument("--series", help="TOKENS,..., without a cap")
    parser.add_argument("--variant", choices=VARIANTS, default="hasten")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--offload-embedding", action="store_true", help="keep the embedding in CPU memory")
    parser.add_argument("--search", help="CAP,...")
    parser.add_argument("--host-gib", type=float, help="of a search: pinned CPU memory to assume")
    args = parser.parse_args(arguments)
    pairs = [pair.split(":") for pair in args.points.split(",")] if args.points else []
    capped: list[Point] = [(float(cap), int(length)) for cap, length in pairs]
    args.points = capped + [(None, int(length)) for length in (args.series.split(",") if args.series else [])]
    if args.series and args.variant != "hasten":
        parser.error('--series runs with hasten\'s "offload"; leave --variant out')
    if not args.search and not (args.points and args.out and args.checkpoints):
        parser.error("pass --search, or --out, --checkpoints and at least one of --points and --series")
    return args


def main(arguments: list[str]) -> int:
    """Returns 0 whatever fits: a failure under a cap is a result."""
    args = parse(arguments)
    if args.search:
        for cap in args.search.split(","):
            job = job_of(args.shape, GRAIN, args.offload_embedding)
            print(search(job, float(cap), args.host_gib), flush=True)
        return 0
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / f"longest-{args.variant}{'-offload' if args.offload_embedding else ''}.json")
    job = job_of(args.shape, max(length for _, length in args.points), args.offload_embedding)
    record.rows("longest", rows(args.variant, job, args.points, args.checkpoints), line_of)
    if (fit := linearity(record.result["longest"])) is not None:
        record.put("linearity", fit, str(fit))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
