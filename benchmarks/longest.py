"""The longest row that an 8B QLoRA step (r=32, one row) takes under a cap of device memory, and how the peak grows with it.

    python -m benchmarks.longest --out FOLDER --checkpoints FOLDER --points 24:163840,8:16384 [--variant unsloth]
    python -m benchmarks.longest --out FOLDER --checkpoints FOLDER --series 8192,16384,32768,65536
    python -m benchmarks.longest --search 24,48                        what the planner expects to fit; takes no step
    ... --offload-embedding                                            any of these with the embedding in host memory
Writes FOLDER/longest-VARIANT.json (-offload.json with the embedding in host memory). A point is CAP in GiB : tokens. The model is
loaded once and the optimizer's state stays; each point is one whole step: forward, backward, fused AdamW. A cap is what nvidia-smi
may show of the process: torch's allocator gets the cap less the CUDA context (benchmarks/capped.py), hasten's "auto" a RESERVE less
than that, for what the allocator cannot hand out. Peers run their default checkpointing. A series runs with "offload" and no cap.
Best under PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which a row records.
"""

import argparse
import datetime
import gc
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.capped import Card
from benchmarks.jobs import GIB, SHAPES, VARIANTS, Job
from benchmarks.shapes import config_of, with_positions, write_apart
from benchmarks.train_step import DEVICE, Steps, forget_peaks, peaks
from benchmarks.variants import build, import_library, planned

RANK = 32
RESERVE = 0.02
"""Of what torch's allocator may take, what hasten is not told of: memory that lies in pieces too small to be of use."""
WARM_LENGTH = 4096
"""Tokens of the short steps that compile the kernels: more than one tile of rows."""
GRAIN = 1024
"""Tokens to which a search is exact."""
CONTEXT_GIB = 0.75
"""What a search, which takes no step, assumes of the CUDA context with all kernels."""
NO_MEMORY = ("out of memory", "GPU memory available")
"""What errors of too little memory say, torch's and those of peers that look at what is free."""
Point = tuple[float | None, int]
"""(cap in GiB or None, tokens)."""


def job_of(shape: str, longest: int, offload_embedding: bool = False) -> Job:
    title = f"{shape}, QLoRA r={RANK}, one row"
    return Job(title, shape, "qlora", 1, longest, rank=RANK, offload_embedding=offload_embedding)


def load(variant: str, job: Job, checkpoints: Path) -> Steps:
    """The model with its adapter, ready for rows of the job's length."""
    import_library(variant)
    folder = with_positions(write_apart(job.shape, checkpoints), job.length)
    model, loss = build(variant, job, "default", folder)
    return Steps(model, loss, job, variant)


def switch(steps: Steps, mode: str, budget: int | None = None) -> None:
    """hasten's checkpointing; a peer keeps its own."""
    if steps.variant == "hasten":
        from hasten.training import checkpointing

        checkpointing.enable(steps.model, mode, budget)


def warm(steps: Steps) -> None:
    """Compiles what steps with as little kept as can be need, and those with everything kept."""
    length = min(WARM_LENGTH, steps.job.length)
    for budget in (1, None):
        switch(steps, "auto", budget)
        steps.timed(steps.batch(length))


def one_point(steps: Steps, card: Card, point: Point) -> dict[str, Any]:
    """One step, as a row: see `rows`."""
    cap, length = point
    allowed = card.cap(cap)
    switch(steps, "offload" if cap is None else "auto", None if allowed is None else int(allowed * (1 - RESERVE)))
    gc.collect()  # what the plan before, or a step that failed, held
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    forget_peaks()
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
    row |= {**peaks(), "allocator": _allocator()}
    return row | (planned(steps.model, 1, length) if steps.variant == "hasten" else {})


def _allocator() -> str | None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return next((os.environ[name] for name in names if name in os.environ), None)


def rows(variant: str, job: Job, points: Sequence[Point], checkpoints: Path) -> Iterator[dict[str, Any]]:
    """{"variant", "cap_gib", "length", "offload_embedding", "context_gib", "ok", "peak_gib", "reserved_gib", "predicted_gib",
    "seconds", "loss", "plan", "error", "allocator"} of each point, as soon as it is there."""
    steps = load(variant, job, checkpoints)
    warm(steps)
    with Card() as card:
        for point in points:
            yield one_point(steps, card, point)


def linearity(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The line through the peaks of a series, by least squares; None for fewer than three rows that came through.

    {"gib_at_zero", "gib_per_1024", "residual_gib", "residual_share": largest distance from it, and as a share of the peak, "rows"}.
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
    """{"cap_gib", "length", "predicted_gib", "plan"}: the longest row, in steps of GRAIN, that the planner finds room for; length 0
    where not even GRAIN tokens fit. host_gib: host memory that may be pinned, None = as the policy would take here."""
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
    where = ", embedding in host memory" if row["offload_embedding"] else ""
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
    parser.add_argument("--offload-embedding", action="store_true", help="the embedding waits in host memory")
    parser.add_argument("--search", help="CAP,...")
    parser.add_argument("--host-gib", type=float, help="of a search: host memory that may be pinned")
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
    """0 where it ran, whatever came through: what fails under a cap is a finding."""
    args = parse(arguments)
    if args.search:
        for cap in args.search.split(","):
            job = job_of(args.shape, GRAIN, args.offload_embedding)
            print(search(job, float(cap), args.host_gib), flush=True)
        return 0
    name = f"longest-{args.variant}{'-offload' if args.offload_embedding else ''}.json"
    for folder in (args.out, args.checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    result = {"date": datetime.date.today().isoformat(), "versions": results.versions(), "longest": []}
    job = job_of(args.shape, max(length for _, length in args.points), args.offload_embedding)
    for row in rows(args.variant, job, args.points, args.checkpoints):
        result["longest"].append(row)
        if (fit := linearity(result["longest"])) is not None:
            result["linearity"] = fit
        results.write(result, args.out / name)
        print(line_of(row), flush=True)
    if "linearity" in result:
        print(result["linearity"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
