"""FlashAttention-2 (Dao 2023, arXiv:2307.08691), causal, with window, softcap, spans and grouped queries.

Each program computes one block of queries of one head. It saves lse = log2(sum(2 ** score)) per query, from which the
backward recomputes the attention weights. Blocks of keys that causality, the window or the spans hide from all queries
of a block are skipped. Scores are in base 2 (log2(e) is folded into the scale), so that exp2 can be used. Heads of one
group read the same K and V in place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from hasten.ops.attention import LARGEST_HEAD
from hasten.ops.attention.kernels.backward import attention_bwd
from hasten.ops.attention.kernels.tiles import (
    LENGTHS,
    ScoreMaskConfig,
    Tiles,
    dot,
    key_range,
    launch,
    score,
    tile,
    tiles_for,
    visible,
)
from hasten.ops.autograd import run
from hasten.ops.backend import on_device, shared_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _fwd_range(
    acc, total, top, q, k_ptr, v_ptr, spans_ptr, lo, hi, query, stride_k, stride_v, T, D, window, scale, cap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr, KEYS: tl.constexpr,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    for start in range(lo, hi, KEYS):
        k = tile(k_ptr, start, stride_k, rows, cols, T, D, MASKED, PAD)
        scores, _ = score(dot(q, tl.trans(k), UPCAST), scale, cap, SOFTCAP, EXACT)
        if MASKED:
            key = start + rows
            last = key
            if SPANS:
                last = tl.load(spans_ptr + key.to(tl.int64) * 3 + 1, mask=key < T, other=-1)
            seen = visible(query[:, None], key[None, :], last[None, :], window, WINDOW, SPANS)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = new_top
        if MASKED:  # no visible key yet
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v = tile(v_ptr, start, stride_v, rows, cols, T, D, MASKED, PAD)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, UPCAST)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=LENGTHS)
def _attention_fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, spans_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    T, H, GROUP, D, window, scale, cap,
    WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, QUERIES)
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # the blocks with the most keys first
    b, h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    rows, cols = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    query = first_query + rows
    q = tile(q_ptr + b * stride_qb + h * stride_qh, first_query, stride_qt, rows, cols, T, D, True, PAD)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    spans_ptr += b * T * 3
    lo, full, diagonal, hi = key_range(spans_ptr, first_query, T, window, WINDOW, SPANS, QUERIES, KEYS)
    acc = tl.zeros((QUERIES, CHANNELS), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    if WINDOW or SPANS:
        acc, total, top = _fwd_range(
            acc, total, top, q, k_ptr, v_ptr, spans_ptr, lo, full, query, stride_kt, stride_vt, T, D, window, scale, cap,
            True, WINDOW, SPANS, SOFTCAP, KEYS, CHANNELS, PAD, UPCAST, EXACT,
        )  # fmt: skip
    acc, total, top = _fwd_range(
        acc, total, top, q, k_ptr, v_ptr, spans_ptr, full, diagonal, query, stride_kt, stride_vt, T, D, window, scale, cap,
        False, WINDOW, SPANS, SOFTCAP, KEYS, CHANNELS, PAD, UPCAST, EXACT,
    )  # fmt: skip
    acc, total, top = _fwd_range(
        acc, total, top, q, k_ptr, v_ptr, spans_ptr, diagonal, hi, query, stride_kt, stride_vt, T, D, window, scale, cap,
        True, WINDOW, SPANS, SOFTCAP, KEYS, CHANNELS, PAD, UPCAST, EXACT,
    )  # fmt: skip
    blind = total == 0.0  # padding: no visible key
    out = acc / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, 0.0, top + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(lse_ptr + (b * H + h) * T + query, lse, mask=query < T)
    out_ptr += ((b * T + query) * H + h)[:, None] * D + cols[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=(query < T)[:, None] & (cols < D)[None, :])


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: torch.Tensor | None, config: ScoreMaskConfig, tiles: Tiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out (B, T, H, D), lse (B, H, T) fp32 in base 2, 0 for a query without a visible key)."""
    batch, tokens, heads, channels = q.shape
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, tokens, device=q.device, dtype=torch.float32)
    grid = (triton.cdiv(tokens, tiles.fwd.queries) * batch * heads,)
    with on_device(q):
        _attention_fwd[grid](
            q, k, v, out, lse, spans if spans is not None else lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            tokens, heads, heads // k.shape[2], channels, *config.arguments(), **config.flags(q, spans), **launch(tiles.fwd),
        )  # fmt: skip
    return out, lse


class AttentionFunction(torch.autograd.Function):
    """Saves q, k, v (no copies), the output, and lse: one fp32 number per query and head."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: torch.Tensor | None,
        config: ScoreMaskConfig,
        tiles: Tiles | None,
    ) -> torch.Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        ctx.config = config
        ctx.tiles = tiles or tiles_for(q.dtype, max(16, triton.next_power_of_2(q.shape[-1])), shared_memory(q.device))
        out, lse = attention_fwd(q, k, v, spans, config, ctx.tiles)
        ctx.save_for_backward(q, k, v, out, lse, spans)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        q, k, v, out, lse, spans = ctx.saved_tensors
        return *attention_bwd(d_out, (q, k, v, out, lse, spans), ctx.config, ctx.tiles), None, None, None


def attention(  # noqa: PLR0913
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    spans_BT3: torch.Tensor | None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """See `ops.attention.attention`. tiles: None = by dtype, head size and shared memory (`tiles_for`).

    Raises ValueError for head sizes, dtypes or spans that the kernels do not support.
    """
    head = q_BTHD.shape[-1]
    if not 2 <= head <= LARGEST_HEAD:
        raise ValueError(f"the attention kernels support heads of 2 to {LARGEST_HEAD} channels; got {head}")
    if q_BTHD.dtype not in DTYPES or not q_BTHD.dtype == k_BTKD.dtype == v_BTKD.dtype:
        raise ValueError(
            f"q, k, v must share one dtype of float32, bfloat16 and float16; got {q_BTHD.dtype}, {k_BTKD.dtype}, {v_BTKD.dtype}"
        )
    if spans_BT3 is not None:
        if spans_BT3.shape != (*q_BTHD.shape[:2], 3) or spans_BT3.dtype != torch.int32:
            raise ValueError(f"spans are (B, T, 3) int32; got {tuple(spans_BT3.shape)} {spans_BT3.dtype}")
        spans_BT3 = spans_BT3.contiguous()
    if q_BTHD.numel() == 0:
        return torch.zeros_like(q_BTHD)
    config = ScoreMaskConfig(scale, window, softcap)
    return run(AttentionFunction, q_BTHD, k_BTKD, v_BTKD, spans_BT3, config, tiles)
