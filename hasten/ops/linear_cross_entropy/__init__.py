"""From hidden states to per-token scores without ever holding the tokens x vocabulary logits.

With   raw = hidden @ weight.T + bias + lora.scale * (hidden @ lora.a.T) @ lora.b.T          in hidden's dtype
       z = softcap * tanh(raw * logit_scale / softcap) / temperature                         in fp32
       p = softmax(z)
the scores of a token with label y are
       log_prob = log p[y]            entropy = -sum p log p           is_top1 = (argmax z == y)
       loss = (1 - s) * -log p[y] + s * mean_v(-log p[v])              s = label_smoothing
       log_sum_sq_probs = log sum p^2                                  mean_logits = mean_v z
and all of them are zero where y == ignore_index.
"""

from dataclasses import dataclass

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.linear_cross_entropy import reference


@dataclass(frozen=True)
class ScoreRule:
    """How raw logits become scores. `softcap` None = none. `want`: the optional scores to compute."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    label_smoothing: float = 0.0
    want: frozenset[str] = frozenset()
    chunk: int = 1024


@dataclass(frozen=True)
class LoraHead:
    """A LoRA on the head: a (R, E), b (V, R), and the scale alpha / r (Hu et al. 2021, arXiv:2106.09685)."""

    a_RE: torch.Tensor
    b_VR: torch.Tensor
    scale: float


@dataclass(frozen=True)
class TokenScores:
    """Per-token scores, each (N,), fp32; None where not wanted. Gradients flow from loss, log_prob and entropy."""

    loss: torch.Tensor
    log_prob: torch.Tensor
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None


OPTIONAL_SCORES = frozenset({"entropy", "is_top1", "log_sum_sq_probs", "mean_logits"})


def linear_cross_entropy(
    hidden_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    rule: ScoreRule,
    bias_V: torch.Tensor | None = None,
    lora: LoraHead | None = None,
    backend: Backend | None = None,
) -> TokenScores:
    """Scores every token's label, in chunks of `rule.chunk` tokens.

    hidden_NE: (N, E). weight_VE: (V, E). labels_N: (N,) int64, in [0, V) or rule.ignore_index. bias_V: (V,).
    Hidden, weight, bias and LoRA share a dtype and a device. Gradients: hidden, weight, bias, lora.a, lora.b (each
    summed over chunks in fp32); differentiable once. Peak extra memory: a few fp32 buffers of chunk x V.
    Raises ValueError for a score name that does not exist, IndexError for a label outside of
    the vocabulary (on a GPU, where looking would wait for the device, that token's scores are NaN instead).
    """
    unknown = rule.want - OPTIONAL_SCORES
    if unknown:
        raise ValueError(f"no such token score: {sorted(unknown)}; there are {sorted(OPTIONAL_SCORES)}")
    run = reference.score_tokens
    if backend_for(hidden_NE, backend) == "triton":
        from hasten.ops.linear_cross_entropy import kernel

        run = kernel.score_tokens
    loss, log_prob, *optional = run(hidden_NE, weight_VE, labels_N, rule, bias_V, lora)
    return TokenScores(loss, log_prob, *optional)


def score_logits(raw_NV: torch.Tensor, labels_N: torch.Tensor, rule: ScoreRule) -> TokenScores:
    """The same scores from raw logits that are already there (N, V), through plain autograd.

    For heads that only their own module can compute. The caller bounds the memory by giving few rows at a time.
    """
    loss, log_prob, *optional = reference.score_logits(raw_NV, labels_N, rule)
    return TokenScores(loss, log_prob, *optional)
