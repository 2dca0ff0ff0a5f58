"""The fused head in plain torch: from the logits of a chunk to its scores and to the gradient of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hasten.ops.linear_cross_entropy.function import SCORES, Upstream
from hasten.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from hasten.ops.linear_cross_entropy import ScoreConfig


def labelled(labels_N: torch.Tensor, config: ScoreConfig, vocabulary: int) -> torch.Tensor:
    """Returns the indices of the tokens whose label is not ignored. Raises IndexError for a label outside of the
    vocabulary."""
    kept = (labels_N != config.ignore_index).nonzero().squeeze(1)
    labels = labels_N[kept]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise IndexError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the vocabulary has {vocabulary} tokens"
        )
    return kept


def score_rows(
    raw_NV: torch.Tensor,
    labels_N: torch.Tensor,
    config: ScoreConfig,
    scores: torch.Tensor | None,
    upstream: Upstream | None,
) -> torch.Tensor | None:
    """Implements `function.ScoreRows`, without ignored labels; fills only the scores that `config.want` names."""
    z, squashed = _logits(raw_NV, config)
    log_p = z.log_softmax(-1)
    if scores is not None:
        for name, value in _scores(z, log_p, labels_N, config).items():
            scores[SCORES.index(name)] = value
    if upstream is None:
        return None
    d_raw = _logit_gradient(log_p, labels_N, upstream, config) * (config.logit_scale / config.temperature)
    if squashed is not None:
        d_raw = d_raw * (1.0 - squashed * squashed)
    return d_raw.to(raw_NV.dtype)


def score_logits(raw_NV: torch.Tensor, labels_N: torch.Tensor, config: ScoreConfig) -> tuple[torch.Tensor | None, ...]:
    kept = labels_N != config.ignore_index
    z, _ = _logits(raw_NV, config)
    scores = _scores(z, z.log_softmax(-1), labels_N.where(kept, 0), config)
    return tuple(scores[name].where(kept, 0.0) if name in scores else None for name in SCORES)


def _logits(raw: torch.Tensor, config: ScoreConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (z, the tanh of the softcap or None), the latter for the derivative."""
    scaled = at_least_fp32(raw) * config.logit_scale
    if config.softcap is None:
        return scaled / config.temperature, None
    squashed = torch.tanh(scaled / config.softcap)
    return squashed * (config.softcap / config.temperature), squashed


def _scores(z: torch.Tensor, log_p: torch.Tensor, labels: torch.Tensor, config: ScoreConfig) -> dict[str, torch.Tensor]:
    log_prob = log_p.gather(-1, labels[:, None]).squeeze(-1)
    loss = -log_prob
    if config.label_smoothing:
        loss = (1.0 - config.label_smoothing) * loss - config.label_smoothing * log_p.mean(-1)
    scores = {"loss": loss, "log_prob": log_prob}
    if "entropy" in config.want:
        scores["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if "is_top1" in config.want:
        scores["is_top1"] = (z.argmax(-1) == labels).to(z.dtype)
    if "log_sum_sq_probs" in config.want:
        scores["log_sum_sq_probs"] = (2.0 * log_p).logsumexp(-1)
    if "mean_logits" in config.want:
        scores["mean_logits"] = z.mean(-1)
    return scores


def _logit_gradient(log_p: torch.Tensor, labels: torch.Tensor, upstream: Upstream, config: ScoreConfig) -> torch.Tensor:
    """Computes dLoss/dz of one chunk: d log_prob = onehot - p;  d entropy = -p (log p + entropy);  d loss from both
    terms."""
    d_loss, d_log_prob, d_entropy = upstream
    p = log_p.exp()
    grad = torch.zeros_like(p)
    hit = torch.zeros_like(p[:, 0])
    if d_loss is not None:
        grad += d_loss[:, None] * (p - config.label_smoothing / p.shape[-1])
        hit -= d_loss * (1.0 - config.label_smoothing)
    if d_log_prob is not None:
        grad -= d_log_prob[:, None] * p
        hit += d_log_prob
    if d_entropy is not None:
        entropy = -(p * log_p).sum(-1, keepdim=True)
        grad -= d_entropy[:, None] * p * (log_p + entropy)
    return grad.scatter_add_(-1, labels[:, None], hit[:, None])
