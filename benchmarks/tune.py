"""Which launch of a kernel is the fastest, and how far is it from the ceilings?

    python -m benchmarks.tune [attention-8b head nf4 ...]
Prints a table per choice, the fastest first: median times with the L2 cache flushed before each call. Each result is compared with
that of the first call; one that differs stops the run. Attention's first calls are the launches in use (tiles.py); below them are the
rates of torch's backends on as many heads of K and V as of Q.
"""

import contextlib
import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks import limits
from benchmarks.harness import timing
from benchmarks.harness.timing import DEVICE, DTYPE, draw
from benchmarks.ops import quantized
from benchmarks.tables import ops_table
from hasten.ops import ScoreConfig
from hasten.ops.attention import row_spans
from hasten.ops.attention.kernels.backward import attention_bwd
from hasten.ops.attention.kernels.forward import attention_fwd
from hasten.ops.attention.kernels.tiles import ScoreMaskConfig, Tile, tiles_for
from hasten.ops.backend import shared_memory
from hasten.ops.linear_cross_entropy import kernel as head_kernel
from hasten.ops.linear_cross_entropy.function import Upstream
from hasten.ops.nf4.kernels import dequantize as nf4_kernel

COMPILERS = 12
UNFIT = (TritonError, RuntimeError, ValueError)
"""Errors of a launch that does not fit a shape."""
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Choice:
    """Calls that do the same work: `moved` bytes, `flops`. off: largest relative error from the first one's result, None = the
    calls overwrite their input and are not compared."""

    title: str
    calls: Calls
    moved: float
    flops: float = 0.0
    off: float | None = 1e-2


@dataclass(frozen=True)
class Shape:
    """Of attention. documents: of equal length in each sequence."""

    batch: int
    tokens: int
    heads: int
    kv: int
    dim: int
    window: int | None = None
    documents: int = 1

    @property
    def flops(self) -> float:
        """Of the forward, visible pairs only; the backward does 2.5 times as much."""
        length = self.tokens / self.documents
        span = min(self.window or length, length)
        return 4.0 * self.batch * self.heads * self.dim * self.documents * (length * span - span**2 / 2)


SHAPES = {
    "8b": Shape(4, 2048, 32, 8, 128),
    "1b": Shape(8, 2048, 32, 8, 64),
    "gemma-2b": Shape(4, 2048, 8, 1, 256),
    "command-r": Shape(4, 2048, 64, 64, 128),
    "window": Shape(1, 16384, 32, 8, 128, 4096),
    "packed": Shape(4, 2048, 32, 8, 128, None, 4),
}
TILES = {
    64: {
        "fwd": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
        "dkdv": [(64, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 2), (32, 128, 4, 3), (128, 128, 8, 2)],
        "dq": [(128, 64, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
    },
    128: {
        "fwd": [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 3)],
        "dkdv": [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2)],
        "dq": [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3), (64, 32, 4, 3)],
    },
    256: {
        "fwd": [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 32, 4, 3)],
        "dkdv": [(32, 64, 8, 2), (32, 32, 4, 2), (64, 64, 8, 1), (16, 64, 8, 2)],
        "dq": [(64, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1), (32, 32, 4, 2)],
    },
}
"""Head dimension -> kernel -> arguments of Tile, tried besides the one in use."""


def attention(name: str, small: bool) -> Iterator[Choice]:
    """q, k and v are slices of one buffer, as the fused projection leaves them. A tile replaces one kernel's at a time."""
    shape = replace(SHAPES[name], batch=1, tokens=256) if small else SHAPES[name]
    at, counts = (shape.batch, shape.tokens), (shape.heads, shape.kv, shape.kv)
    parts = draw(*at, sum(counts) * shape.dim).split([n * shape.dim for n in counts], -1)
    q, k, v = (part.unflatten(-1, (-1, shape.dim)) for part in parts)
    upstream, rule, spans = (
        draw(*at, shape.heads, shape.dim),
        ScoreMaskConfig(shape.dim**-0.5, shape.window, None),
        None,
    )
    if shape.documents > 1:
        position = torch.arange(shape.tokens, device=DEVICE) % (shape.tokens // shape.documents)
        spans = row_spans((*at, q.device), None, position[None])
    table = tiles_for(DTYPE, shape.dim, shared_memory(q.device))
    saved: Any = (q, k, v, *attention_fwd(q, k, v, spans, rule, table), spans)
    moved = 2.0 * shape.batch * shape.tokens * 2 * (shape.heads + shape.kv) * shape.dim
    for kernel, tiles in TILES[shape.dim].items():
        calls: Calls = {}
        for tile in dict.fromkeys([getattr(table, kernel), *(Tile(*one) for one in tiles)]):
            tried = replace(table, **{kernel: tile})
            forward = functools.partial(attention_fwd, q, k, v, spans, rule, tried)
            calls[str(tile)] = (
                forward if kernel == "fwd" else functools.partial(attention_bwd, upstream, saved, rule, tried)
            )
        more = 1.0 if kernel == "fwd" else 2.5
        yield Choice(f"attention {name}, {kernel}", calls, 2 * moved if more > 1 else moved, more * shape.flops)


def head(small: bool) -> Iterator[Choice]:
    """The kernel on one chunk of tokens: logits are read and their gradient written; a second read may hit the L2 cache."""
    tokens, words = (4, 501) if small else (2048, 128256)
    raw, labels = draw(tokens, words, scale=0.05), torch.randint(0, words, (tokens,), device=DEVICE)
    given = torch.empty(6, tokens, device=DEVICE), Upstream(torch.ones(tokens, device=DEVICE))
    extras = ScoreConfig(want=frozenset({"entropy", "is_top1"}))
    for name, rule in (("training", ScoreConfig()), ("softcap", ScoreConfig(softcap=30.0)), ("entropy, top 1", extras)):
        call = functools.partial(head_kernel.score_rows, raw, labels, rule, *given)
        calls: Calls = {str(launch): functools.partial(call, launch) for launch in head_kernel.LAUNCHES}
        yield Choice(f"head, {name}, {tokens} x {words}", calls, 2.0 * raw.nbytes, off=None)


def nf4(small: bool) -> Iterator[Choice]:
    """bitsandbytes' kernel and ours, the last one into a matrix whose rows are apart."""
    shapes = [(14336, 4096, 0), (1024, 4096, 0), (8192, 8192, 0), (16384, 2048, 0), (4096, 4096, 64)]
    for rows, width, gap in [(3, 192, 7)] if small else shapes:
        weight, theirs = quantized((rows, width))
        out = torch.empty(rows, width + gap, device=DEVICE, dtype=DTYPE)[:, :width]
        call = functools.partial(nf4_kernel.dequantize_nf4, weight, DTYPE, out)
        calls: Calls = {str(launch): functools.partial(call, launch) for launch in nf4_kernel.LAUNCHES}
        yield Choice(f"NF4, {rows} x {width} + {gap}", {"bitsandbytes": theirs, **calls}, 2.5 * out.numel())


SUBJECTS: dict[str, Callable[[bool], Iterable[Choice]]] = {
    **{f"attention-{name}": functools.partial(attention, name) for name in SHAPES}, "head": head, "nf4": nf4,
}  # fmt: skip
"""Subject -> (small) -> its choices. small: on shapes that only compile the kernels."""


def compile_one(subject: str, index: int) -> None:
    """Compiles one call of a subject into Triton's cache by running it on a small shape."""
    calls = [call for choice in SUBJECTS[subject](True) for call in choice.calls.values()]
    with contextlib.suppress(*UNFIT):  # the measurement meets the same error and reports it
        calls[index]()


def measure(choice: Choice, ceilings: dict[str, Any]) -> list[timing.Row]:
    """Prints the table of a choice and returns its rows, the fastest first. Raises AssertionError if two results differ."""
    from hasten.testing import relative_error  # slow to import: not in the processes that compile

    expected, rows = None, []
    for name, call in choice.calls.items():
        try:
            out = call()
        except UNFIT as error:
            print(f"{name}: {str(error).strip().splitlines()[-1][:90]}", flush=True)
            continue
        if choice.off is not None:
            found = [x.clone() for x in (out if isinstance(out, tuple) else (out,))]
            expected = expected or found
            error = max(relative_error(x, y) for x, y in zip(found, expected, strict=True))
            assert error < choice.off, f"{choice.title}: {name} differs from the first by {error:.1e}"
        rows += timing.rows({name: call}, choice.moved, choice.flops, warm_ms=5, measure_ms=25)
    rows.sort(key=lambda row: row["ms"])
    print(f"\n{choice.title}\n{ops_table({'ops': rows, 'ceilings': ceilings})}", flush=True)
    return rows


def main(subjects: list[str]) -> None:
    """subjects: of SUBJECTS, [] = all."""
    counts = {one: sum(len(choice.calls) for choice in SUBJECTS[one](True)) for one in subjects or SUBJECTS}
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for one in [pool.submit(compile_one, subject, i) for subject, n in counts.items() for i in range(n)]:
            one.result()
    ceilings = {"copy": limits.copy_rate(), "matmul": limits.matmul_rate()}
    for subject in counts:
        for choice in SUBJECTS[subject](False):
            measure(choice, ceilings)
        if shape := SHAPES.get(subject.removeprefix("attention-")):
            print(limits.attention_rates(shape.batch, shape.heads, shape.tokens, shape.dim), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
