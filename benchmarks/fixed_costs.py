"""What a step costs whatever its size: waits of the host, compilations, imports."""

import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.train_step import Steps

ROOT = Path(__file__).parent.parent
IMPORTS = {
    "torch": "import torch",
    "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel",
    "peft": "import peft",
    "hasten": "from hasten import FastLanguageModel",
}


def host_waits(steps: "Steps") -> dict[str, Any]:
    """{"count", "where"}: how often one step makes the host wait for the device, and at which lines.

    The inputs are on the device before. Counted by `torch.cuda.set_sync_debug_mode`; 0 without a GPU.
    """
    ids = steps.batch()
    steps.take(ids)
    if not torch.cuda.is_available():
        return {"count": 0, "where": []}
    torch.cuda.synchronize()
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
    """file:line as seen from the folder of packages, or of this repository, that it lies in."""
    path = Path(file)
    roots = [one for one in path.parents if one.name.endswith("-packages") or one == ROOT]
    return f"{path.relative_to(roots[0]) if roots else Path(*path.parts[-3:])}:{line}"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the Triton kernels that this process compiles (or takes from the disk cache) meanwhile."""
    from triton import knobs

    names: list[str] = []

    def note(**told: Any) -> None:
        names.append(told["fn"].name)

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


def new_lengths(steps: "Steps", lengths: Sequence[int]) -> list[dict[str, Any]]:
    """For each length in turn: {"length", "compiled", "first_ms", "second_ms"} of its first two steps."""
    rows = []
    for length in lengths:
        with compilations() as compiled:
            first, _ = steps.timed(steps.batch(length))
        second, _ = steps.timed(steps.batch(length))
        rows.append(
            {"length": length, "compiled": sorted(compiled), "first_ms": first * 1e3, "second_ms": second * 1e3}
        )
    return rows


def import_seconds(repeats: int = 3) -> dict[str, float]:
    """Median seconds of each of IMPORTS, beyond the ones before it, in fresh processes."""
    marks = [f"{line}\nmarks.append(time.perf_counter())" for line in IMPORTS.values()]
    program = "\n".join(["import json, time", "marks = [time.perf_counter()]", *marks, "print(json.dumps(marks))"])
    taken: list[list[float]] = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seen = json.loads(done.stdout.splitlines()[-1])
        taken.append([after - before for before, after in pairwise(seen)])
    return {name: statistics.median(run[i] for run in taken) for i, name in enumerate(IMPORTS)}
