"""What the attention kernels share: loading a tile, scores, who sees whom, and how large tiles are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LENGTHS = ["T", "window"]  # they change from call to call: no kernel is compiled anew for them


@dataclass(frozen=True)
class Tile:
    """queries x keys of one tile of scores, both powers of two from 16 on; warps and pipeline stages of the launch."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """A tile for each kernel: forward, dK and dV, dQ."""

    fwd: Tile
    dkdv: Tile
    dq: Tile


TABLE = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(32, 128, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 4, 2)),
}
"""By the padded head's channels, for 16-bit inputs: the fastest on an H200 (benchmarks/attention_speed.py)."""
IN_96_KIB = TABLE | {256: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))}
IN_64_KIB = {
    64: Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: Tiles(Tile(32, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
"""What fits into the shared memory of GPUs that have less (GeForce RTX, T4). Compiled for them (tests/ops/compile_kernels.py), not timed there."""

FP32 = Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1))
FP32_WIDE = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))


def tiles_for(dtype: torch.dtype, channels: int, room: int) -> Tiles:
    """channels: of a head, padded to a power of two. room: bytes of shared memory that a block of threads may take."""
    if dtype == torch.float32:
        return FP32 if channels <= 128 else FP32_WIDE
    table = TABLE if room >= 160 * 2**10 else IN_96_KIB if room >= 96 * 2**10 else IN_64_KIB
    return table[max(64, channels)]


@dataclass(frozen=True)
class ScoreMaskConfig:
    """What the kernels know beside tensors, by name as they take it."""

    scale: float
    window: int | None
    softcap: float | None

    def arguments(self) -> tuple[int, float, float]:
        """(window, factor before tanh, factor after): scores come out in base 2."""
        if self.softcap is None:
            return self.window or 0, self.scale * LOG2_E, 1.0
        return self.window or 0, self.scale / self.softcap, self.softcap * LOG2_E

    def flags(self, q: torch.Tensor, spans: torch.Tensor | None) -> dict[str, int | bool]:
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
    """Tokens start + rows of one head, zero where there are none. ptr: the head's first token."""
    where = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if MASK_ROWS:
        return tl.load(where, mask=(start + rows < T)[:, None] & (cols < D)[None, :], other=0.0)
    elif MASK_COLS:
        return tl.load(where, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """UPCAST: Triton's interpreter multiplies 16-bit matrices wrongly; a GPU does it right."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def score(qk, scale, cap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """(score in base 2, tanh's slope). Without a softcap `scale` holds log2(e); with one `cap` does.

    EXACT: small arguments by their series, where 2 sigmoid(2x) - 1 loses digits that fp32 inputs have.
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
    """query, key: positions, shaped to broadcast to a tile. last: the last query that may see each key."""
    seen = key <= query
    if WINDOW:
        seen = seen & (key > query - window)
    if SPANS:
        seen = seen & (query <= last)
    return seen


@triton.jit
def key_range(spans_ptr, first_query, T, window, WINDOW: tl.constexpr, SPANS: tl.constexpr, QUERIES: tl.constexpr,
               KEYS: tl.constexpr):  # fmt: skip
    """(lo, full, diagonal, hi): keys in [full, diagonal) are seen by every query of the block, whole blocks of them."""
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
