"""Backward of FlashAttention-2: delta = rowsum(dO * O), then dK and dV per block of keys, dQ per block of queries.

The attention weights are recomputed from the scores and the forward's lse. The dK/dV kernel loops over the query heads
of a group, so K and V are never expanded, and there are no atomic adds: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hasten.ops.attention.kernels.tiles import (
    LENGTHS,
    ScoreMaskConfig,
    Tiles,
    dot,
    key_range,
    launch,
    score,
    tile,
    visible,
)
from hasten.ops.backend import on_device


@triton.jit(do_not_specialize=["T"])
def _delta(out_ptr, d_ptr, delta_ptr, stride_db, stride_dt, stride_dh, T, H, D, CHANNELS: tl.constexpr,
           QUERIES: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(T, QUERIES)
    first = tl.program_id(0) % blocks * QUERIES
    b, h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    rows, cols = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    d = tile(d_ptr + b * stride_db + h * stride_dh, first, stride_dt, rows, cols, T, D, True, True)
    out = tile(out_ptr + (b * T * H + h) * D, first, H * D, rows, cols, T, D, True, True)
    delta = tl.sum(d.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * T + first + rows, delta, mask=first + rows < T)


@triton.jit
def _dkdv_range(
    dk, dv, k, v, q_ptr, d_ptr, lse_ptr, delta_ptr, lo, hi, key, last, stride_q, stride_d, T, D, window, scale, cap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr, QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Accumulates dK and dV over a range of queries. Score tiles are transposed (keys x queries), so that they are the
    left operand of both matmuls."""
    rows, cols = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    for start in range(lo, hi, QUERIES):
        q = tile(q_ptr, start, stride_q, rows, cols, T, D, MASKED, PAD)
        d = tile(d_ptr, start, stride_d, rows, cols, T, D, MASKED, PAD)
        query = start + rows
        if MASKED:  # queries beyond the end have zero gradient and delta
            lse = tl.load(lse_ptr + query, mask=query < T, other=0.0)
            delta = tl.load(delta_ptr + query, mask=query < T, other=0.0)
        else:
            lse, delta = tl.load(lse_ptr + query), tl.load(delta_ptr + query)
        scores, slope = score(dot(k, tl.trans(q), UPCAST), scale, cap, SOFTCAP, EXACT)
        p = tl.exp2(scores - lse[None, :])
        if MASKED:
            p = tl.where(visible(query[None, :], key[:, None], last[:, None], window, WINDOW, SPANS), p, 0.0)
        dv += dot(p.to(d.dtype), d, UPCAST)
        ds = p * (dot(v, tl.trans(d), UPCAST) - delta[None, :]) * slope
        dk += dot(ds.to(q.dtype), q, UPCAST)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _attention_dkdv(
    q_ptr, k_ptr, v_ptr, d_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, spans_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, T, H, GROUP, D, window, scale, cap, plain_scale,
    WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks, kv_heads = tl.cdiv(T, KEYS), H // GROUP
    first_key = tl.program_id(0) % blocks * KEYS
    b, g = (tl.program_id(0) // blocks // kv_heads).to(tl.int64), (tl.program_id(0) // blocks % kv_heads).to(tl.int64)
    rows, cols = tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    key = first_key + rows
    k = tile(k_ptr + b * stride_kb + g * stride_kh, first_key, stride_kt, rows, cols, T, D, True, PAD)
    v = tile(v_ptr + b * stride_vb + g * stride_vh, first_key, stride_vt, rows, cols, T, D, True, PAD)
    # Queries in [diagonal, whole) attend to every key of the block: whole blocks of queries, within the sequence, without a mask.
    hi, last = T, key
    diagonal = first_key + (KEYS + QUERIES - 2) // QUERIES * QUERIES
    if WINDOW:
        hi = tl.minimum(hi, first_key + KEYS - 1 + window)
    whole_end = hi
    if WINDOW:
        whole_end = tl.minimum(T, first_key + window)
    if SPANS:
        last = tl.load(spans_ptr + (b * T + key) * 3 + 1, mask=key < T, other=-1)
        hi = tl.minimum(hi, tl.max(last, 0) + 1)
        whole_end = tl.minimum(whole_end, tl.min(tl.where(key < T, last, T), 0) + 1)
    diagonal = tl.minimum(diagonal, hi)
    whole = diagonal + tl.maximum(whole_end - diagonal, 0) // QUERIES * QUERIES
    dk = tl.zeros((KEYS, CHANNELS), tl.float32)
    dv = tl.zeros((KEYS, CHANNELS), tl.float32)
    for member in range(GROUP):
        h = g * GROUP + member
        q_head, d_head = q_ptr + b * stride_qb + h * stride_qh, d_ptr + b * stride_db + h * stride_dh
        lse_head, delta_head = lse_ptr + (b * H + h) * T, delta_ptr + (b * H + h) * T
        dk, dv = _dkdv_range(
            dk, dv, k, v, q_head, d_head, lse_head, delta_head, first_key, diagonal, key, last, stride_qt, stride_dt, T, D,
            window, scale, cap, True, WINDOW, SPANS, SOFTCAP, QUERIES, CHANNELS, PAD, UPCAST, EXACT,
        )  # fmt: skip
        dk, dv = _dkdv_range(
            dk, dv, k, v, q_head, d_head, lse_head, delta_head, diagonal, whole, key, last, stride_qt, stride_dt, T, D,
            window, scale, cap, False, WINDOW, SPANS, SOFTCAP, QUERIES, CHANNELS, PAD, UPCAST, EXACT,
        )  # fmt: skip
        dk, dv = _dkdv_range(
            dk, dv, k, v, q_head, d_head, lse_head, delta_head, whole, hi, key, last, stride_qt, stride_dt, T, D,
            window, scale, cap, True, WINDOW, SPANS, SOFTCAP, QUERIES, CHANNELS, PAD, UPCAST, EXACT,
        )  # fmt: skip
    where = ((b * T + key) * kv_heads + g)[:, None] * D + cols[None, :]
    mask = (key < T)[:, None] & (cols < D)[None, :]
    tl.store(dk_ptr + where, (dk * plain_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + where, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dq_range(
    dq, q, d, lse, delta, k_ptr, v_ptr, spans_ptr, lo, hi, query, stride_k, stride_v, T, D, window, scale, cap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr, KEYS: tl.constexpr,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    for start in range(lo, hi, KEYS):
        k = tile(k_ptr, start, stride_k, rows, cols, T, D, MASKED, PAD)
        v = tile(v_ptr, start, stride_v, rows, cols, T, D, MASKED, PAD)
        scores, slope = score(dot(q, tl.trans(k), UPCAST), scale, cap, SOFTCAP, EXACT)
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            key = start + rows
            last = key
            if SPANS:
                last = tl.load(spans_ptr + key.to(tl.int64) * 3 + 1, mask=key < T, other=-1)
            p = tl.where(visible(query[:, None], key[None, :], last[None, :], window, WINDOW, SPANS), p, 0.0)
        ds = p * (dot(d, tl.trans(v), UPCAST) - delta[:, None]) * slope
        dq += dot(ds.to(k.dtype), k, UPCAST)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def _attention_dq(
    q_ptr, k_ptr, v_ptr, d_ptr, lse_ptr, delta_ptr, dq_ptr, spans_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_db, stride_dt, stride_dh, T, H, GROUP, D, window, scale, cap, plain_scale,
    WINDOW: tl.constexpr, SPANS: tl.constexpr, SOFTCAP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CHANNELS: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, QUERIES)
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # the blocks with the most keys first
    b, h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    rows, cols = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    query = first_query + rows
    q = tile(q_ptr + b * stride_qb + h * stride_qh, first_query, stride_qt, rows, cols, T, D, True, PAD)
    d = tile(d_ptr + b * stride_db + h * stride_dh, first_query, stride_dt, rows, cols, T, D, True, PAD)
    lse = tl.load(lse_ptr + (b * H + h) * T + query, mask=query < T, other=0.0)
    delta = tl.load(delta_ptr + (b * H + h) * T + query, mask=query < T, other=0.0)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    spans_ptr += b * T * 3
    lo, full, diagonal, hi = key_range(spans_ptr, first_query, T, window, WINDOW, SPANS, QUERIES, KEYS)
    dq = tl.zeros((QUERIES, CHANNELS), tl.float32)
    if WINDOW or SPANS:
        dq = _dq_range(
            dq, q, d, lse, delta, k_ptr, v_ptr, spans_ptr, lo, full, query, stride_kt, stride_vt, T, D, window, scale,
            cap, True, WINDOW, SPANS, SOFTCAP, KEYS, CHANNELS, PAD, UPCAST, EXACT,
        )  # fmt: skip
    dq = _dq_range(
        dq, q, d, lse, delta, k_ptr, v_ptr, spans_ptr, full, diagonal, query, stride_kt, stride_vt, T, D, window, scale,
        cap, False, WINDOW, SPANS, SOFTCAP, KEYS, CHANNELS, PAD, UPCAST, EXACT,
    )  # fmt: skip
    dq = _dq_range(
        dq, q, d, lse, delta, k_ptr, v_ptr, spans_ptr, diagonal, hi, query, stride_kt, stride_vt, T, D, window, scale, cap,
        True, WINDOW, SPANS, SOFTCAP, KEYS, CHANNELS, PAD, UPCAST, EXACT,
    )  # fmt: skip
    where = ((b * T + query) * H + h)[:, None] * D + cols[None, :]
    mask = (query < T)[:, None] & (cols < D)[None, :]
    tl.store(dq_ptr + where, (dq * plain_scale).to(dq_ptr.dtype.element_ty), mask=mask)


def attention_bwd(
    d: torch.Tensor, saved: tuple[torch.Tensor, ...], config: ScoreMaskConfig, tiles: Tiles
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dq, dk, dv, contiguous. d: (B, T, H, D), the gradient of out, any strides. saved: q, k, v, out, lse, and
    spans or None."""
    q, k, v, out, lse, spans = saved
    d = d if d.stride(-1) == 1 else d.contiguous()
    batch, tokens, heads, channels = q.shape
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    strides = [s for x in (q, k, v, d) for s in x.stride()[:3]]
    flags = config.flags(q, spans)
    common = (*strides, tokens, heads, heads // k.shape[2], channels, *config.arguments(), config.scale)
    pointer = spans if spans is not None else lse
    with on_device(q):
        _delta[(triton.cdiv(tokens, 64) * batch * heads,)](
            out, d, delta, *d.stride()[:3], tokens, heads, channels, CHANNELS=flags["CHANNELS"], QUERIES=64
        )
        _attention_dkdv[(triton.cdiv(tokens, tiles.dkdv.keys) * batch * k.shape[2],)](
            q, k, v, d, lse, delta, dk, dv, pointer, *common, **flags, **launch(tiles.dkdv)
        )
        _attention_dq[(triton.cdiv(tokens, tiles.dq.queries) * batch * heads,)](
            q, k, v, d, lse, delta, dq, pointer, *common, **flags, **launch(tiles.dq)
        )
    return dq, dk, dv
