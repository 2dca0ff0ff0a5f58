"""Fuses softmax, scores and the gradient of the logits into one kernel. No host sync.

One program takes the logits of one token (a row): it reads them once for the scores and a second time for the
gradient, which overwrites them. Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867): each thread keeps the
running maximum and sums of its own columns, eight neighbouring ones at a time, and they are reduced once, at the end of
the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device
from hasten.ops.linear_cross_entropy.function import Upstream

if TYPE_CHECKING:
    from hasten.ops.linear_cross_entropy import ScoreConfig


@dataclass(frozen=True)
class Launch:
    """columns: of a row per step of the loop. warps: per program."""

    columns: int
    warps: int


LAUNCHES = (
    Launch(8192, 16), Launch(8192, 32), Launch(8192, 8), Launch(4096, 16), Launch(4096, 8), Launch(16384, 16),
    Launch(16384, 32),
)  # fmt: skip
"""Launches to choose from: the first one is used; `python -m benchmarks.tune head` times all."""


@triton.jit
def _softcapped(raw, inner, outer, slope, SOFTCAP: tl.constexpr):
    """Returns (z, dz/draw) of a raw logit."""
    if SOFTCAP:
        t = 2.0 * tl.sigmoid(2.0 * inner * raw) - 1.0  # tanh
        return t * outer, (1.0 - t * t) * slope
    else:
        return raw * outer, slope


@triton.jit(do_not_specialize=["count"])
def _score_rows(
    raw_ptr, labels_ptr, scores_ptr, d_loss_ptr, d_log_prob_ptr, d_entropy_ptr,
    stride_raw, V, count, inner, outer, slope, ignore_index, smoothing,
    SOFTCAP: tl.constexpr, SCORES: tl.constexpr, ENTROPY: tl.constexpr, TOP1: tl.constexpr, SQUARES: tl.constexpr,
    MEAN: tl.constexpr, GRAD: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_LOG_PROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    base = raw_ptr + row * stride_raw
    group = tl.arange(0, BLOCK // 8) * 8
    cols = group[:, None] + tl.arange(0, 8)[None, :]
    if label == ignore_index:
        if SCORES:
            for k in tl.static_range(6):
                tl.store(scores_ptr + k * count + row, 0.0)
        if GRAD:
            for start in range(0, V, BLOCK):
                zero = tl.zeros((BLOCK // 8, 8), raw_ptr.dtype.element_ty)
                tl.store(base + start + cols, zero, mask=start + cols < V)
        return
    known = (label >= 0) & (label < V)
    raw_label = tl.load(base + label, mask=known, other=float("nan")).to(tl.float32)
    top = tl.full((BLOCK // 8,), -3e38, tl.float32)  # finite: -inf - -inf would be NaN
    top_at = tl.zeros((BLOCK // 8,), tl.int32)
    total = tl.zeros((BLOCK // 8,), tl.float32)
    weighted = tl.zeros((BLOCK // 8,), tl.float32)
    squares = tl.zeros((BLOCK // 8,), tl.float32)
    plain = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, V, BLOCK):
        mask = start + cols < V
        raw = tl.load(base + start + cols, mask=mask, other=0.0).to(tl.float32)
        z, _ = _softcapped(raw, inner, outer, slope, SOFTCAP)
        if MEAN:
            plain += tl.sum(tl.where(mask, z, 0.0), axis=1)
        z = tl.where(mask, z, -float("inf"))
        highest = tl.max(z, axis=1)
        if TOP1:
            top_at = tl.where(highest > top, start + group + tl.argmax(z, axis=1), top_at)
        new_top = tl.maximum(top, highest)
        shrink = tl.exp(top - new_top)
        e = tl.exp(z - new_top[:, None])
        if ENTROPY:  # sum of e * (z - top): no cancellation where all z are large
            below = tl.where(mask, (z - new_top[:, None]) * e, 0.0)
            weighted = (weighted + total * (top - new_top)) * shrink + tl.sum(below, axis=1)
        total = total * shrink + tl.sum(e, axis=1)
        if SQUARES:
            squares = squares * shrink * shrink + tl.sum(e * e, axis=1)
        top = new_top
    highest = tl.max(top, axis=0)
    shrink = tl.exp(top - highest)
    sum_exp = tl.sum(total * shrink, axis=0)
    log_sum = tl.log(sum_exp)
    entropy = log_sum
    if ENTROPY:
        entropy = log_sum - tl.sum((weighted + total * (top - highest)) * shrink, axis=0) / sum_exp
    tl.debug_barrier()  # the label's logit must be read before another warp overwrites it with its gradient
    if SCORES:
        z_label, _ = _softcapped(raw_label, inner, outer, slope, SOFTCAP)
        log_prob = (z_label - highest) - log_sum
        loss = -log_prob
        if MEAN:
            mean = tl.sum(plain, axis=0) / V
            loss = (1.0 - smoothing) * loss + smoothing * ((highest - mean) + log_sum)
            tl.store(scores_ptr + 5 * count + row, mean)
        tl.store(scores_ptr + row, loss)
        tl.store(scores_ptr + count + row, log_prob)
        if ENTROPY:
            tl.store(scores_ptr + 2 * count + row, entropy)
        if TOP1:
            first = tl.min(tl.where(top == highest, top_at, V), axis=0)
            tl.store(scores_ptr + 3 * count + row, tl.where(first == label, 1.0, 0.0))
        if SQUARES:
            log_squares = tl.log(tl.sum(squares * shrink * shrink, axis=0))
            tl.store(scores_ptr + 4 * count + row, log_squares - 2.0 * log_sum)
    if GRAD:
        g_loss = 0.0
        g_log_prob = 0.0
        g_entropy = 0.0
        if HAS_LOSS:
            g_loss = tl.load(d_loss_ptr + row).to(tl.float32)
        if HAS_LOG_PROB:
            g_log_prob = tl.load(d_log_prob_ptr + row).to(tl.float32)
        if HAS_ENTROPY:
            g_entropy = tl.load(d_entropy_ptr + row).to(tl.float32)
        hit = g_log_prob - g_loss * (1.0 - smoothing)
        spread = g_loss * smoothing / V
        factor = (g_loss - g_log_prob) / sum_exp
        for start in range(0, V, BLOCK):
            mask = start + cols < V
            raw = tl.load(base + start + cols, mask=mask, other=0.0).to(tl.float32)
            z, dz = _softcapped(raw, inner, outer, slope, SOFTCAP)
            e = tl.exp(z - highest)
            d = factor * e - spread
            if HAS_ENTROPY:
                d -= g_entropy / sum_exp * e * ((z - highest) - log_sum + entropy)
            d += tl.where(start + cols == label, hit, 0.0)
            tl.store(base + start + cols, (d * dz).to(raw_ptr.dtype.element_ty), mask=mask)


def score_rows(
    raw_NV: torch.Tensor,
    labels_N: torch.Tensor,
    config: ScoreConfig,
    scores: torch.Tensor | None,
    upstream: Upstream | None,
    launch: Launch = LAUNCHES[0],
) -> torch.Tensor | None:
    """Implements `function.ScoreRows`; the gradient overwrites raw. raw: contiguous columns, any row stride."""
    d_loss, d_log_prob, d_entropy = upstream if upstream is not None else Upstream()
    rows, words = raw_NV.shape
    scored = scores is not None
    block = min(launch.columns, max(64, triton.next_power_of_2(words)))
    slope = config.logit_scale / config.temperature
    if rows == 0:
        return None if upstream is None else raw_NV
    with on_device(raw_NV):
        _score_rows[(rows,)](
            raw_NV, labels_N, *(x if x is not None else labels_N for x in (scores, d_loss, d_log_prob, d_entropy)),
            raw_NV.stride(0), words, scores.stride(0) if scores is not None else 0,
            0.0 if config.softcap is None else config.logit_scale / config.softcap,
            slope if config.softcap is None else config.softcap / config.temperature, slope,
            config.ignore_index, config.label_smoothing,
            SOFTCAP=config.softcap is not None, SCORES=scored,
            ENTROPY=(scored and "entropy" in config.want) or d_entropy is not None,
            TOP1=scored and "is_top1" in config.want, SQUARES=scored and "log_sum_sq_probs" in config.want,
            MEAN=scored and ("mean_logits" in config.want or config.label_smoothing != 0.0),
            GRAD=upstream is not None, HAS_LOSS=d_loss is not None, HAS_LOG_PROB=d_log_prob is not None,
            HAS_ENTROPY=d_entropy is not None, BLOCK=block,
            num_warps=launch.warps if block == launch.columns else 4,
        )  # fmt: skip
    return None if upstream is None else raw_NV
