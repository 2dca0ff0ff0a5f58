"""The launches that a kernel could use, beside other implementations: which is the fastest, and how far is it from the ceilings?

    python -m benchmarks.tune [attention-8b head nf4 ...]
Prints a table per choice, the fastest first: median times with the L2 cache flushed before each call. Each result is compared with
that of the first implementation; one that differs stops the run. Backward tiles replace one kernel's entry in the table of
hasten/ops/attention/kernels/tiles.py at a time.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
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
from hasten.ops.nf4 import kernel as nf4_kernel

COMPILERS = 12
UNFIT = (TritonError, RuntimeError, ValueError, TypeError, ImportError)
"""Errors of a backend or a launch that does not support a shape, or that this version of torch lacks."""
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Choice:
    """Calls that do the same work: `moved` bytes, `flops`. off: largest relative error from the first one's result, None = the
    calls overwrite their input and are not compared."""

    title: str
    calls: Calls
    moved: float
    flops: float
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
TILES: dict[int, dict[str, list[tuple[int, int, int, int]]]] = {
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
"""Head dimension -> kernel -> arguments of Tile, tried besides the table's own."""


def torchs(shape: Shape) -> dict[str, Callable[..., torch.Tensor]]:
    """torch's implementations of this attention, each (q, k, v) -> out, all (B, T, H, D)."""
    group = shape.heads // shape.kv

    def sdpa(backend: SDPBackend | None, expand: bool, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        if expand:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expand and group > 1)
        return out.transpose(1, 2)

    def varlen(*qkv: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        length = shape.tokens // shape.documents
        starts = torch.arange(0, shape.batch * shape.tokens + 1, length, device=DEVICE, dtype=torch.int32)
        window, gqa = ((shape.window or 0) - 1, 0), {} if group == 1 else {"enable_gqa": True}
        q, k, v = (x.flatten(0, 1) for x in qkv)
        out: Any = varlen_attn(q, k, v, starts, starts, length, length, window_size=window, **gqa)
        return out.unflatten(0, (shape.batch, -1))

    ways: dict[str, Callable[..., torch.Tensor]] = {}
    if shape.window is None and shape.documents == 1:
        ways["sdpa as torch chooses"] = functools.partial(sdpa, None, False)
        for name, backend in limits.BACKENDS.items():
            for expand in (False, True) if group > 1 else (False,):
                ways[f"sdpa {name}{', K and V expanded' if expand else ''}"] = functools.partial(sdpa, backend, expand)
    return ways | {"varlen_attn": varlen}


def attention(name: str, small: bool) -> Iterator[Choice]:
    """Forward and backward; q, k and v are slices of one buffer, as the fused projection leaves them."""
    shape = replace(SHAPES[name], batch=1, tokens=256) if small else SHAPES[name]
    at, counts = (shape.batch, shape.tokens), (shape.heads, shape.kv, shape.kv)
    parts = draw(*at, sum(counts) * shape.dim).split([n * shape.dim for n in counts], -1)
    qkv = [part.unflatten(-1, (-1, shape.dim)) for part in parts]
    leaves, upstream = [x.detach().requires_grad_() for x in qkv], draw(*at, shape.heads, shape.dim)
    rule, spans = ScoreMaskConfig(shape.dim**-0.5, shape.window, None), None
    if shape.documents > 1:
        position = torch.arange(shape.tokens, device=DEVICE) % (shape.tokens // shape.documents)
        spans = row_spans((*at, upstream.device), None, position[None])
    table = tiles_for(DTYPE, shape.dim, shared_memory(upstream.device))
    saved: Any = (*qkv, *attention_fwd(qkv[0], qkv[1], qkv[2], spans, rule, table), spans)

    def forward(tiles: Any) -> torch.Tensor:
        return attention_fwd(qkv[0], qkv[1], qkv[2], spans, rule, tiles)[0]

    def backward_of(way: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        graph = functools.cache(lambda: way(*leaves))
        return lambda: torch.autograd.grad(graph(), leaves, upstream, retain_graph=True)

    forwards: Calls = {way: functools.partial(call, *qkv) for way, call in torchs(shape).items()}
    backwards: Calls = {way: backward_of(call) for way, call in torchs(shape).items()}
    for kernel, tiles in TILES[shape.dim].items():
        for tile in dict.fromkeys([getattr(table, kernel), *(Tile(*one) for one in tiles)]):
            tried = replace(table, **{kernel: tile})
            if kernel == "fwd":
                forwards[f"hasten, {tile}"] = functools.partial(forward, tried)
            else:
                backwards[f"hasten, {kernel} {tile}"] = functools.partial(attention_bwd, upstream, saved, rule, tried)
    moved = 2.0 * shape.batch * shape.tokens * 2 * (shape.heads + shape.kv) * shape.dim
    yield Choice(f"attention {name}, forward", forwards, moved, shape.flops)
    yield Choice(f"attention {name}, backward", backwards, 2 * moved, 2.5 * shape.flops, 3e-2)


def head(small: bool) -> Iterator[Choice]:
    """The kernel on one chunk of tokens: logits are read and their gradient written; a second read may hit the L2 cache."""
    tokens, words = (4, 501) if small else (2048, 128256)
    raw, labels = draw(tokens, words, scale=0.05), torch.randint(0, words, (tokens,), device=DEVICE)
    scores, upstream = torch.empty(6, tokens, device=DEVICE), Upstream(torch.ones(tokens, device=DEVICE))
    extras = ScoreConfig(want=frozenset({"entropy", "is_top1"}))
    for name, rule in (("training", ScoreConfig()), ("softcap", ScoreConfig(softcap=30.0)), ("entropy, top 1", extras)):
        calls: Calls = {
            f"hasten, {launch}": functools.partial(head_kernel.score_rows, raw, labels, rule, scores, upstream, launch)
            for launch in head_kernel.LAUNCHES
        }
        yield Choice(f"head kernel, {name}, {tokens} x {words}", calls, 4.0 * raw.numel(), 0.0, None)


def nf4(small: bool) -> Iterator[Choice]:
    """bitsandbytes' kernel and ours, the last one into a matrix whose rows are apart."""
    shapes = [(14336, 4096), (4096, 14336), (1024, 4096), (4096, 4096), (8192, 8192), (16384, 2048), (4096, 4096)]
    for shape, gap in [((3, 192), 7)] if small else zip(shapes, [*[0] * (len(shapes) - 1), 64], strict=True):
        weight, theirs = quantized(shape)
        out = torch.empty(shape[0], shape[1] + gap, device=DEVICE, dtype=DTYPE)[:, : shape[1]]
        calls: Calls = {"bitsandbytes": theirs}
        for launch in nf4_kernel.LAUNCHES:
            calls[f"hasten, {launch}"] = functools.partial(nf4_kernel.dequantize_nf4, weight, DTYPE, out, launch)
        yield Choice(f"NF4 to bf16, {shape[0]} x {shape[1]} + {gap}", calls, 2.5 * out.numel(), 0.0)


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
    subjects = subjects or list(SUBJECTS)
    count = {subject: sum(len(choice.calls) for choice in SUBJECTS[subject](True)) for subject in subjects}
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for one in [pool.submit(compile_one, subject, i) for subject in subjects for i in range(count[subject])]:
            one.result()
    ceilings = {"copy": limits.copy_rate(), "matmul": limits.matmul_rate()}
    for subject in subjects:
        for choice in SUBJECTS[subject](False):
            measure(choice, ceilings)


if __name__ == "__main__":
    main(sys.argv[1:])
