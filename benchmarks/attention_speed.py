"""Attention on the shapes of training: torch's backends and our kernels with every candidate tile. About a minute on an H200.

    python -m benchmarks.attention_speed [name of a shape, ...]
q, k and v are slices of one buffer, as the fused projection leaves them. Our results are first compared with torch's. A line:
what, forward ms and TFLOP/s, backward ms and TFLOP/s; only visible pairs count. The last lines are the best tile of each
kernel, in the form of hasten/ops/attention/kernels/tiles.py.
"""

import functools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.errors import TritonError

from benchmarks.harness.timing import draw, milliseconds
from hasten.ops.attention import row_spans
from hasten.ops.attention.kernels.backward import attention_bwd
from hasten.ops.attention.kernels.forward import attention_fwd
from hasten.ops.attention.kernels.tiles import ScoreMaskConfig, Tile, Tiles, tiles_for
from hasten.ops.backend import shared_memory

COMPILERS = 12
UNFIT = (TritonError, RuntimeError, ValueError, TypeError)
"""Errors of a backend or a tile that does not support a shape."""
timed = functools.partial(milliseconds, warm_ms=5, measure_ms=25)


@dataclass(frozen=True)
class Shape:
    """documents: of equal length in each sequence."""

    batch: int
    tokens: int
    heads: int
    kv: int
    dim: int
    window: int | None = None
    documents: int = 1

    @property
    def flops(self) -> float:
        """Of the forward; the backward does 2.5 times as much."""
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
CANDIDATES: dict[int, dict[str, list[tuple[int, int, int, int]]]] = {
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
"""Head dimension -> kernel -> arguments of Tile."""


class Inputs:
    """q, k, v as slices of one buffer, and the output's gradient, contiguous."""

    def __init__(self, shape: Shape) -> None:
        heads, at = (shape.heads, shape.kv, shape.kv), (shape.batch, shape.tokens)
        parts = draw(*at, sum(heads) * shape.dim).split([n * shape.dim for n in heads], -1)
        q, k, v = (part.unflatten(-1, (-1, shape.dim)) for part in parts)
        self.qkv = (q, k, v)
        self.upstream = draw(*at, shape.heads, shape.dim)
        self.rule, self.spans = ScoreMaskConfig(shape.dim**-0.5, shape.window, None), None
        if shape.documents > 1:
            position = torch.arange(shape.tokens, device="cuda") % (shape.tokens // shape.documents)
            self.spans = row_spans((*at, self.upstream.device), None, position[None])

    def ours(self, tiles: Tiles) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Our forward and backward, without arguments."""

        def forward() -> Any:
            return attention_fwd(*self.qkv, self.spans, self.rule, tiles)

        out, lse = forward()
        saved: Any = (*self.qkv, out, lse, self.spans)
        return forward, lambda: attention_bwd(self.upstream, saved, self.rule, tiles)

    def through_autograd(self, function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, float, float]:
        """(output, forward ms, backward ms)."""
        leaves = [x.detach().requires_grad_() for x in self.qkv]
        out = function(*leaves)
        backward = timed(lambda: torch.autograd.grad(out, leaves, self.upstream, retain_graph=True))
        return out, timed(lambda: function(*leaves)), backward


def line(name: str, shape: Shape, forward: float, backward: float) -> None:
    rates = shape.flops / forward / 1e9, 2.5 * shape.flops / backward / 1e9
    print(
        f"  {name:42s} fwd {forward:7.3f} ms {rates[0]:5.0f}   bwd {backward:7.3f} ms {rates[1]:5.0f} TFLOP/s",
        flush=True,
    )


def torchs(shape: Shape) -> dict[str, Callable[..., torch.Tensor]]:
    """torch's implementations of this attention, each (q, k, v) -> out, all (B, T, H, D)."""
    group = shape.heads // shape.kv

    def sdpa(backend: SDPBackend | None, expand: bool, q: Any, k: Any, v: Any) -> torch.Tensor:
        if backend is not None:
            with sdpa_kernel(backend):
                return sdpa(None, expand, q, k, v)
        if expand:
            k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expand and group > 1)
        return out.transpose(1, 2)

    ways: dict[str, Callable[..., torch.Tensor]] = {}
    if shape.window is None and shape.documents == 1:
        ways["sdpa as torch chooses"] = functools.partial(sdpa, None, False)
        for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
            for expand in (False, True) if group > 1 else (False,):
                ways[f"sdpa {name}{', K and V expanded' if expand else ''}"] = functools.partial(sdpa, backend, expand)
    ways["varlen_attn"] = functools.partial(varlen, shape)
    return ways


def varlen(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import varlen as module

    varlen_attn: Any = module.varlen_attn
    length = shape.tokens // shape.documents
    starts = torch.arange(0, shape.batch * shape.tokens + 1, length, device="cuda", dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    extra: dict[str, Any] = {} if shape.heads == shape.kv else {"enable_gqa": True}
    window = {"window_size": ((shape.window or 0) - 1, 0)}
    try:
        causal = {"is_causal": True} if shape.window is None else window
        out = varlen_attn(q, k, v, starts, starts, length, length, **causal, **extra)
    except TypeError:  # torch's signature differs between versions
        out = varlen_attn(q, k, v, starts, starts, length, length, **window, **extra)
    return out.unflatten(0, (shape.batch, -1))


def variants(shape: Shape) -> Iterator[tuple[str, Tile, Tiles]]:
    """(kernel, its tile, the table's tiles with that one replaced)."""
    table = tiles_for(torch.bfloat16, shape.dim, shared_memory(torch.device("cuda")))
    for kernel, tiles in CANDIDATES[shape.dim].items():
        for tile in dict.fromkeys([getattr(table, kernel), *(Tile(*one) for one in tiles)]):
            yield kernel, tile, replace(table, **{kernel: tile})


def compile_one(shape: Shape, kernel: str, tiles: Tiles) -> str | None:
    """Compiles one variant into Triton's cache by running it on a short sequence. Returns why it cannot run."""
    try:
        Inputs(replace(shape, batch=1, tokens=256)).ours(tiles)[kernel != "fwd"]()
        torch.cuda.synchronize()
    except UNFIT as error:
        return str(error).splitlines()[0][:70]
    return None


def measure(name: str, shape: Shape, unfit: dict[Any, str | None]) -> None:
    from hasten.testing import relative_error  # slow to import: not in the processes that compile

    print(f"{name}: {shape}", flush=True)
    inputs = Inputs(shape)
    expected = None
    for way, function in torchs(shape).items():
        try:
            out, forward, backward = inputs.through_autograd(function)
        except (*UNFIT, ImportError) as error:
            print(f"  {way}: {str(error).splitlines()[0][:90]}", flush=True)
            continue
        expected = out if expected is None else expected
        line(way, shape, forward, backward)
    best: dict[str, tuple[float, Tile]] = {}
    for kernel, tile, tiles in variants(shape):
        if unfit.get((shape, kernel, tile)):
            print(f"  {kernel} {tile}: {unfit[shape, kernel, tile]}", flush=True)
            continue
        forward, backward = inputs.ours(tiles)
        if kernel == "fwd" and expected is not None:
            error = relative_error(forward()[0], expected)
            assert error < 1e-2, f"{tile} differs from torch by {error}"
        spent = timed(forward if kernel == "fwd" else backward)
        flops = shape.flops * (1 if kernel == "fwd" else 2.5)
        print(f"  ours, {kernel:4s} {tile}: {spent:.3f} ms, {flops / spent / 1e9:.0f} TFLOP/s", flush=True)
        best[kernel] = min(best.get(kernel, (spent, tile)), (spent, tile), key=lambda pair: pair[0])
    tiles = Tiles(**{kernel: tile for kernel, (_, tile) in best.items()})
    line("ours, best tiles", shape, *map(timed, inputs.ours(tiles)))
    print(f"  {shape.dim}: {tiles}", flush=True)


def main() -> None:
    shapes = {name: SHAPES[name] for name in sys.argv[1:] or SHAPES}
    jobs = {(shape, kernel, tile): tiles for shape in shapes.values() for kernel, tile, tiles in variants(shape)}
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {job: pool.submit(compile_one, job[0], job[1], tiles) for job, tiles in jobs.items()}
        unfit = {job: future.result() for job, future in running.items()}
    for name, shape in shapes.items():
        measure(name, shape, unfit)


if __name__ == "__main__":
    main()
