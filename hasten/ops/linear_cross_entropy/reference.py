"""The fused head in plain torch: two chunked passes, the second one recomputes each chunk's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from hasten.ops.linear_cross_entropy import LoraHead, ScoreRule

SCORES = ("loss", "log_prob", "entropy", "is_top1", "log_sum_sq_probs", "mean_logits")
Tensors = tuple[Any, ...]  # in the order of SCORES; None for a score that was not wanted


def score_tokens(
    hidden_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    rule: ScoreRule,
    bias_V: torch.Tensor | None,
    lora: LoraHead | None,
) -> Tensors:
    """`SCORES`, each (N,) or None. Ignored tokens are left out before anything is multiplied."""
    kept = (labels_N != rule.ignore_index).nonzero().squeeze(1)
    labels = labels_N[kept]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight_VE.shape[0]:
        raise IndexError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; the head has {weight_VE.shape[0]} rows"
        )
    a, b, scale = (lora.a_RE, lora.b_VR, lora.scale) if lora is not None else (None, None, 0.0)
    scores = ScoreTokensFunction.apply(hidden_NE[kept], weight_VE, bias_V, a, b, scale, labels, rule)
    count = labels_N.shape[0]
    return tuple(None if s is None else s.new_zeros(count).index_copy(0, kept, s) for s in scores)


def score_logits(raw_NV: torch.Tensor, labels_N: torch.Tensor, rule: ScoreRule) -> Tensors:
    kept = labels_N != rule.ignore_index
    z, _ = _logits(raw_NV, rule)
    scores = _scores_of_chunk(z, labels_N.where(kept, 0), rule)
    return tuple(scores[name].where(kept, 0.0) if name in scores else None for name in SCORES)


def _raw_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, a: Any, b: Any, scale: float) -> torch.Tensor:
    raw = torch.nn.functional.linear(hidden, weight, bias)
    return raw if a is None else raw + scale * ((hidden @ a.T) @ b.T)


def _logits(raw: torch.Tensor, rule: ScoreRule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z, and tanh(...) where there is a softcap, for its derivative."""
    scaled = at_least_fp32(raw) * rule.logit_scale
    if rule.softcap is None:
        return scaled / rule.temperature, None
    squashed = torch.tanh(scaled / rule.softcap)
    return squashed * (rule.softcap / rule.temperature), squashed


class ScoreTokensFunction(torch.autograd.Function):
    """Scores tokens chunk by chunk. Saves its inputs only; the backward recomputes the logits of each chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
        labels: torch.Tensor,
        rule: ScoreRule,
    ) -> Tensors:
        ctx.save_for_backward(hidden, weight, bias, a, b, labels)
        ctx.scale, ctx.rule = scale, rule
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scores = {name: hidden.new_empty(hidden.shape[0], dtype=wide) for name in ("loss", "log_prob", *rule.want)}
        for part in _chunks(hidden.shape[0], rule.chunk):
            z, _ = _logits(_raw_logits(hidden[part], weight, bias, a, b, scale), rule)
            for name, value in _scores_of_chunk(z, labels[part], rule).items():
                scores[name][part] = value
        outputs = tuple(scores.get(name) for name in SCORES)
        ctx.mark_non_differentiable(*(o for o in outputs[3:] if o is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, a, b, labels = ctx.saved_tensors
        rule, scale, needs = ctx.rule, ctx.scale, ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        sums = [
            torch.zeros_like(at_least_fp32(t)) if need else None
            for t, need in zip((weight, bias, a, b), needs[1:5], strict=True)
        ]
        d_weight, d_bias, d_a, d_b = sums
        for part in _chunks(hidden.shape[0], rule.chunk):
            h = hidden[part]
            z, squashed = _logits(_raw_logits(h, weight, bias, a, b, scale), rule)
            d_raw = _logit_gradient(z, labels[part], grads[0], grads[1], grads[2], part, rule) * (
                rule.logit_scale / rule.temperature
            )
            if squashed is not None:
                d_raw = d_raw * (1.0 - squashed * squashed)
            low = d_raw.to(hidden.dtype)
            d_low_rank = None if a is None else scale * (low @ b)
            if d_hidden is not None:
                d_hidden[part] = low @ weight if d_low_rank is None else low @ weight + d_low_rank @ a
            if d_weight is not None:
                d_weight += at_least_fp32(low.T @ h)
            if d_bias is not None:
                d_bias += d_raw.sum(0)
            if d_a is not None and d_low_rank is not None:
                d_a += at_least_fp32(d_low_rank.T @ h)
            if d_b is not None and a is not None:
                d_b += scale * at_least_fp32(low.T @ (h @ a.T))
        outs = [s if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, (weight, bias, a, b), strict=True)]
        return (d_hidden, *outs, None, None, None)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _scores_of_chunk(z: torch.Tensor, labels: torch.Tensor, rule: ScoreRule) -> dict[str, torch.Tensor]:
    log_p = z.log_softmax(-1)
    log_prob = log_p.gather(-1, labels[:, None]).squeeze(-1)
    loss = -log_prob
    if rule.label_smoothing:
        loss = (1.0 - rule.label_smoothing) * loss - rule.label_smoothing * log_p.mean(-1)
    scores = {"loss": loss, "log_prob": log_prob}
    if "entropy" in rule.want:
        scores["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if "is_top1" in rule.want:
        scores["is_top1"] = (z.argmax(-1) == labels).to(z.dtype)
    if "log_sum_sq_probs" in rule.want:
        scores["log_sum_sq_probs"] = (2.0 * log_p).logsumexp(-1)
    if "mean_logits" in rule.want:
        scores["mean_logits"] = z.mean(-1)
    return scores


def _logit_gradient(  # noqa: PLR0917
    z: torch.Tensor,
    labels: torch.Tensor,
    d_loss: torch.Tensor | None,
    d_log_prob: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    part: slice,
    rule: ScoreRule,
) -> torch.Tensor:
    """dLoss/dz of one chunk: d log_prob = onehot - p;  d entropy = -p (log p + entropy);  d loss from both terms."""
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    grad = torch.zeros_like(z)
    hit = torch.zeros(z.shape[0], dtype=z.dtype, device=z.device)
    if d_loss is not None:
        grad += d_loss[part, None] * (p - rule.label_smoothing / z.shape[-1])
        hit -= d_loss[part] * (1.0 - rule.label_smoothing)
    if d_log_prob is not None:
        grad -= d_log_prob[part, None] * p
        hit += d_log_prob[part]
    if d_entropy is not None:
        entropy = -(p * log_p).sum(-1, keepdim=True)
        grad -= d_entropy[part, None] * p * (log_p + entropy)
    return grad.scatter_add_(-1, labels[:, None], hit[:, None])
