"""Helpers of the attention kernels: tile loads, scores, masks, and the tile sizes per GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LENGTHS = ["T", "window"]
"""Arguments that change from call to call: kernels are not specialised (recompiled) for their values."""


@dataclass(frozen=True)
class Tile:
    """A launch: queries x keys of one score tile (powers of two, at least 16), warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The launches of the three kernels: forward, dK/dV, dQ."""

    fwd: Tile
    dkdv: Tile
    dq: Tile


TABLE = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(32, 128, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 4, 2)),
}
"""Padded head size -> tiles, for 16-bit inputs: the fastest on an H200 (benchmarks/tune.py). 160 KiB of
shared memory."""
IN_96_KIB = TABLE | {256: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))}
IN_64_KIB = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
"""Tiles that fit into less shared memory (GeForce RTX, T4). Compiled for these GPUs (tests/ops/compile_kernels.py),
not timed there."""

FP32 = Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1))
FP32_WIDE = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))


def tiles_for(dtype: torch.dtype, channels: int, shared: int) -> Tiles:
    """Returns the tiles for a dtype. channels: of a head, padded to a power of two. shared: bytes of shared memory per
    thread block."""
    if dtype == torch.float32:
        return FP32 if channels <= 128 else FP32_WIDE
    table = TABLE if shared >= 160 * 2**10 else IN_96_KIB if shared >= 96 * 2**10 else IN_64_KIB
    return table[max(64, channels)]


@dataclass(frozen=True)
class ScoreMaskConfig:
    """How scores are computed and masked. window: in tokens, itself included. softcap: None = none."""

    scale: float
    window: int | None
    softcap: float | None

    def arguments(self) -> tuple[int, float, float]:
        """Returns (window, factor before tanh, factor after it); scores are then in base 2."""
        if self.softcap is None:
            return self.window or 0, self.scale * LOG2_E, 1.0
        return self.window or 0, self.scale / self.softcap, self.softcap * LOG2_E

    def flags(self, q: torch.Tensor, spans: torch.Tensor | None) -> dict[str, int | bool]:
        """Returns the kernels' compile-time arguments."""
        head = q.shape[-1]
        channels = max(16, triton.next_power_of_2(head))
        return {
            "WINDOW": self.window is not None,
            "SPANS": spans is not None,
            "SOFTCAP": self.softcap is not None,
            "CHANNELS": channels,
            "PAD": channels != head,
            "UPCAST": not q.is_cuda,
            "EXACT": q.dtype == torch.float32,
        }


def launch(tile: Tile) -> dict[str, int]:
    return {"QUERIES": tile.queries, "KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


@triton.jit
def tile(ptr, start, stride, rows, cols, T, D, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Loads tokens start + rows of one head, zeros beyond T and D. ptr: the first token of the head."""
    where = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if MASK_ROWS:
        return tl.load(where, mask=(start + rows < T)[:, None] & (cols < D)[None, :], other=0.0)
    elif MASK_COLS:
        return tl.load(where, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """Computes a @ b, accumulated in fp32. UPCAST: set in Triton's interpreter, whose 16-bit dot is wrong."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def score(qk, scale, cap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Returns (score in base 2, derivative of the softcap). Without a softcap `scale` includes log2(e); with one `cap`
    does.

    EXACT: tanh by its Taylor series for |x| < 0.3, where 2 sigmoid(2x) - 1 cancels digits that fp32 inputs have.
    """
    if SOFTCAP:
        x = qk * scale
        t = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        if EXACT:
            y = x * x
            series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * (1382 / 155925)))))
            t = tl.where(tl.abs(x) < 0.3, x * series, t)
        return cap * t, 1.0 - t * t
    else:
        return qk * scale, 1.0


@triton.jit
def visible(query, key, last, window, WINDOW: tl.constexpr, SPANS: tl.constexpr):
    """Returns the mask of a tile, True = visible. query, key: positions that broadcast to the tile. last: see
    `ops.attention.spans`."""
    seen = key <= query
    if WINDOW:
        seen = seen & (key > query - window)
    if SPANS:
        seen = seen & (query <= last)
    return seen


@triton.jit
def key_range(spans_ptr, first_query, T, window, WINDOW: tl.constexpr, SPANS: tl.constexpr, QUERIES: tl.constexpr,
               KEYS: tl.constexpr):  # fmt: skip
    """Returns (lo, full, diagonal, hi) of a block of queries: it attends to keys in [lo, hi); whole blocks in [full,
    diagonal) need no mask."""
    lo = first_query * 0
    clear = lo
    hi = tl.minimum(first_query + QUERIES, T)
    if WINDOW:
        lo = tl.maximum(lo, first_query - window + 1)
        clear = first_query + QUERIES - window
    if SPANS:
        lo = tl.maximum(lo, tl.load(spans_ptr + first_query.to(tl.int64) * 3))
        clear = tl.maximum(clear, tl.load(spans_ptr + (hi - 1).to(tl.int64) * 3 + 2))
    diagonal = lo + tl.maximum(first_query + 1 - lo, 0) // KEYS * KEYS
    full = tl.minimum(lo + tl.cdiv(tl.maximum(clear - lo, 0), KEYS) * KEYS, diagonal)
    return lo, full, diagonal, hi
