"""The fused head on a GPU: cuBLAS for the products, one Triton kernel for everything between logits and their gradient.

A chunk's logits are written once by the product, read by the kernel (its second look at a row comes from the L2 cache),
overwritten with their own gradient, and read by the product that gives the hidden states' gradient. Where neither head
nor LoRA trains, that gradient is made for an upstream gradient of one and only scaled per token in the backward, so no
chunk is ever multiplied twice. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from hasten.ops.linear_cross_entropy import LoraHead, ScoreRule

ORDER = ("loss", "log_prob", "entropy", "is_top1", "log_sum_sq_probs", "mean_logits")


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
    SOFTCAP: tl.constexpr, SCORES: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr, HAS_LOSS: tl.constexpr,
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
        g_loss = 1.0 if UNIT else 0.0
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
    upstream: tuple[torch.Tensor | None, ...] | None,
    unit: bool = False,
) -> None:
    """Fills `scores` (6, N) and, with `unit` or `upstream` (gradients of loss, log_prob, entropy), turns raw into d raw."""
    grads = upstream if upstream is not None else (None, None, None)
    present = [g is not None for g in grads]
    pointers = [g if g is not None else labels_N for g in grads]
    rows, words = raw_NV.shape
    block = min(8192, triton.next_power_of_2(words))
    if rows:
        _score_rows[(rows,)](
            raw_NV, labels_N, scores if scores is not None else labels_N, *pointers, raw_NV.stride(0), words,
            scores.stride(0) if scores is not None else 0, rule.logit_scale, rule.softcap or 1.0, rule.temperature,
            rule.ignore_index, rule.label_smoothing,
            SOFTCAP=rule.softcap is not None, SCORES=scores is not None, GRAD=unit or upstream is not None, UNIT=unit,
            HAS_LOSS=present[0], HAS_LOG_PROB=present[1], HAS_ENTROPY=present[2], BLOCK=block,
            num_warps=16 if block >= 8192 else 4,
        )  # fmt: skip


def _raw(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
    raw = torch.nn.functional.linear(hidden, weight, bias)
    return raw if a is None else raw.addmm_(hidden @ a.T, b.T, alpha=scale)


class ScoreTokensFunction(torch.autograd.Function):
    """Saves its inputs, or, where neither head nor LoRA trains, only the hidden states' gradient for each token's loss."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, a: Any, b: Any, scale: float, labels: Any, rule: Any
    ) -> Any:
        ctx.set_materialize_grads(False)
        count = hidden.shape[0]
        needs = ctx.needs_input_grad
        unit = needs[0] and not any(needs[1:5])
        scores = torch.empty(6, count, device=hidden.device, dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if unit else None
        for start in range(0, count, rule.chunk):
            part = slice(start, min(start + rule.chunk, count))
            raw = _raw(hidden[part], weight, bias, a, b, scale)
            score_rows(raw, labels[part], rule, scores[:, part], None, unit)
            if d_hidden is not None:
                torch.mm(raw, weight, out=d_hidden[part])
                if a is not None:
                    d_hidden[part].addmm_(raw @ b, a, alpha=scale)
        ctx.save_for_backward(hidden, weight, bias, a, b, labels, d_hidden)
        ctx.scale, ctx.rule = scale, rule
        outputs = tuple(scores[k] if k < 2 or name in rule.want else None for k, name in enumerate(ORDER))
        ctx.mark_non_differentiable(*(o for o in outputs[3:] if o is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        hidden, weight, bias, a, b, labels, d_unit = ctx.saved_tensors
        d_loss, d_log_prob, d_entropy = (None if g is None else g.contiguous() for g in grads[:3])
        smoothed = bool(ctx.rule.label_smoothing) and d_log_prob is not None
        if d_unit is not None and d_entropy is None and not smoothed:
            # d loss / d hidden was made with an upstream of one; log_prob is its negative where there is no smoothing.
            per_token = (0.0 if d_loss is None else d_loss) - (0.0 if d_log_prob is None else d_log_prob)
            factor = per_token if isinstance(per_token, torch.Tensor) else torch.zeros_like(d_unit[:, 0])
            return d_unit * factor[:, None].to(d_unit.dtype), *(None,) * 7
        return _recompute(ctx, hidden, weight, bias, a, b, labels, (d_loss, d_log_prob, d_entropy))


def _recompute(ctx: Any, hidden: Any, weight: Any, bias: Any, a: Any, b: Any, labels: Any, upstream: Any) -> Any:
    needs, rule, scale = ctx.needs_input_grad, ctx.rule, ctx.scale
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    inputs = (weight, bias, a, b)
    sums = [
        torch.zeros_like(t, dtype=torch.float32) if need else None for t, need in zip(inputs, needs[1:5], strict=True)
    ]
    d_weight, d_bias, d_a, d_b = sums
    for start in range(0, hidden.shape[0], rule.chunk):
        part = slice(start, min(start + rule.chunk, hidden.shape[0]))
        h = hidden[part]
        raw = _raw(h, weight, bias, a, b, scale)
        score_rows(raw, labels[part], rule, None, tuple(None if g is None else g[part] for g in upstream))
        low = None if a is None else (raw @ b) * scale
        if d_hidden is not None:
            torch.mm(raw, weight, out=d_hidden[part])
            if low is not None:
                d_hidden[part].addmm_(low, a)
        if d_weight is not None:
            _accumulate(d_weight, raw.T, h)
        if d_bias is not None:
            d_bias += raw.sum(0, dtype=torch.float32)
        if d_a is not None and low is not None:
            _accumulate(d_a, low.T, h)
        if d_b is not None and a is not None:
            _accumulate(d_b, raw.T, (h @ a.T) * scale)
    outs = [s if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)]
    return (d_hidden, *outs, None, None, None)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, the product summed and added in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total += left.float() @ right.float()


def score_tokens(
    hidden_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    rule: ScoreRule,
    bias_V: torch.Tensor | None,
    lora: LoraHead | None,
) -> tuple[Any, ...]:
    a, b, scale = (lora.a_RE, lora.b_VR, lora.scale) if lora is not None else (None, None, 0.0)
    args = (hidden_NE, weight_VE, bias_V, a, b, scale, labels_N.contiguous(), rule)
    return ScoreTokensFunction.apply(*args)  # pyright: ignore[reportReturnType]
