"""Everything between a chunk's logits and their gradient, in one Triton kernel. Nothing here waits for the device.

A row of logits is read once for the scores, a second time (from the L2 cache) for the gradient, which takes its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hasten.ops.linear_cross_entropy.function import Upstream

if TYPE_CHECKING:
    from hasten.ops.linear_cross_entropy import ScoreRule


@triton.jit
def _squash(raw, logit_scale, softcap, temperature, SOFTCAP: tl.constexpr):
    """(z, dz/draw)."""
    scaled = raw * logit_scale
    if SOFTCAP:
        t = 2.0 * tl.sigmoid(2.0 * scaled / softcap) - 1.0
        return t * (softcap / temperature), (1.0 - t * t) * (logit_scale / temperature)
    else:
        return scaled / temperature, logit_scale / temperature


@triton.jit
def _score_rows(
    raw_ptr, labels_ptr, scores_ptr, d_loss_ptr, d_log_prob_ptr, d_entropy_ptr,
    stride_raw, V, count, logit_scale, softcap, temperature, ignore_index, smoothing,
    SOFTCAP: tl.constexpr, SCORES: tl.constexpr, GRAD: tl.constexpr, HAS_LOSS: tl.constexpr,
    HAS_LOG_PROB: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    base = raw_ptr + row * stride_raw
    cols = tl.arange(0, BLOCK)
    if label == ignore_index:
        if SCORES:
            for k in tl.static_range(6):
                tl.store(scores_ptr + k * count + row, 0.0)
        if GRAD:
            for start in range(0, V, BLOCK):
                tl.store(base + start + cols, tl.zeros((BLOCK,), raw_ptr.dtype.element_ty), mask=start + cols < V)
        return
    known = (label >= 0) & (label < V)
    top = -float("inf")
    top_at = 0
    total = 0.0
    weighted = 0.0
    squares = 0.0
    plain = 0.0
    for start in range(0, V, BLOCK):
        mask = start + cols < V
        raw = tl.load(base + start + cols, mask=mask, other=0.0).to(tl.float32)
        z, _ = _squash(raw, logit_scale, softcap, temperature, SOFTCAP)
        z = tl.where(mask, z, -float("inf"))
        block_top = tl.max(z, axis=0)
        block_at = start + tl.argmax(z, axis=0)
        top_at = tl.where(block_top > top, block_at, top_at)
        new_top = tl.maximum(top, block_top)
        shrink = tl.exp(top - new_top)
        e = tl.exp(z - new_top)
        total = total * shrink + tl.sum(e, axis=0)
        weighted = weighted * shrink + tl.sum(tl.where(mask, z * e, 0.0), axis=0)
        squares = squares * shrink * shrink + tl.sum(e * e, axis=0)
        plain += tl.sum(tl.where(mask, z, 0.0), axis=0)
        top = new_top
    lse = top + tl.log(total)
    raw_label = tl.load(base + label, mask=known, other=float("nan")).to(tl.float32)
    tl.debug_barrier()  # no warp may write the label's gradient before the one that stores the scores has read its logit
    z_label, _ = _squash(raw_label, logit_scale, softcap, temperature, SOFTCAP)
    entropy = lse - weighted / total
    if SCORES:
        log_prob = z_label - lse
        loss = -(1.0 - smoothing) * log_prob + smoothing * (lse - plain / V)
        tl.store(scores_ptr + row, loss)
        tl.store(scores_ptr + count + row, log_prob)
        tl.store(scores_ptr + 2 * count + row, entropy)
        tl.store(scores_ptr + 3 * count + row, tl.where(top_at == label, 1.0, 0.0))
        tl.store(scores_ptr + 4 * count + row, tl.log(squares) - 2.0 * tl.log(total))
        tl.store(scores_ptr + 5 * count + row, plain / V)
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
        for start in range(0, V, BLOCK):
            mask = start + cols < V
            raw = tl.load(base + start + cols, mask=mask, other=0.0).to(tl.float32)
            z, slope = _squash(raw, logit_scale, softcap, temperature, SOFTCAP)
            p = tl.exp(z - lse)
            d = (g_loss - g_log_prob) * p - g_loss * smoothing / V
            if HAS_ENTROPY:
                d -= g_entropy * p * (z - lse + entropy)
            d += tl.where(start + cols == label, hit, 0.0)
            tl.store(base + start + cols, (d * slope).to(raw_ptr.dtype.element_ty), mask=mask)


def score_rows(
    raw_NV: torch.Tensor,
    labels_N: torch.Tensor,
    rule: ScoreRule,
    scores: torch.Tensor | None,
    upstream: Upstream | None,
) -> torch.Tensor | None:
    """As `function.ScoreRows`: the gradient takes the place of raw, whose rows may be apart but not its columns."""
    grads = upstream if upstream is not None else (None, None, None)
    present = [g is not None for g in grads]
    pointers = [g if g is not None else labels_N for g in grads]
    rows, words = raw_NV.shape
    block = min(8192, triton.next_power_of_2(words))
    if rows == 0:
        return None if upstream is None else raw_NV
    with torch.cuda.device_of(raw_NV):
        _score_rows[(rows,)](
            raw_NV, labels_N, scores if scores is not None else labels_N, *pointers, raw_NV.stride(0), words,
            scores.stride(0) if scores is not None else 0, rule.logit_scale, rule.softcap or 1.0, rule.temperature,
            rule.ignore_index, rule.label_smoothing,
            SOFTCAP=rule.softcap is not None, SCORES=scores is not None, GRAD=upstream is not None,
            HAS_LOSS=present[0], HAS_LOG_PROB=present[1], HAS_ENTROPY=present[2], BLOCK=block,
            num_warps=16 if block >= 8192 else 4,
        )  # fmt: skip
    return None if upstream is None else raw_NV
