"""Fuses the output head (lm_head) with the cross-entropy loss: the tokens x vocabulary logits are never materialised.

With   raw = hidden @ weight.T + bias + lora.scale * (hidden @ lora.a.T) @ lora.b.T          in hidden's dtype
       z = softcap * tanh(raw * logit_scale / softcap) / temperature                         in fp32
       p = softmax(z)
the scores of a token with label y are
       log_prob = log p[y]            entropy = -sum p log p           is_top1 = (argmax z == y)
       loss = (1 - s) * -log p[y] + s * mean_v(-log p[v])              s = label_smoothing
       log_sum_sq_probs = log sum p^2                                  mean_logits = mean_v z
and all of them are zero where y == ignore_index.

N tokens, E hidden size, V vocabulary, R rank of the head's LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.linear_cross_entropy import reference
from hasten.ops.linear_cross_entropy.function import LossFunction, ScoreRows, ScoreTokensFunction


@dataclass(frozen=True)
class ScoreConfig:
    """How raw logits become scores; the equations are at the top of the file.

    softcap: None = none. want: the optional scores to compute, of `OPTIONAL_SCORES`.
    chunk: tokens whose logits are in memory at once; more where the weight trains, see `function.tokens_at_once`.
    """

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
    config: ScoreConfig,
    bias_V: torch.Tensor | None = None,
    lora: LoraHead | None = None,
    backend: Backend | None = None,
) -> TokenScores:
    """Scores the label of every token, chunk by chunk; for per-token losses, RL, and evaluation.

    hidden_NE: (N, E). weight_VE: (V, E). labels_N: (N,) int64, in [0, V) or config.ignore_index. bias_V: (V,).
    All on one device. Weight, bias and LoRA are cast to hidden's dtype for the matmuls; their gradients are summed
    over chunks in fp32 and returned in their own dtypes. Gradients: hidden, weight, bias, lora.a, lora.b;
    differentiable once. If anything but hidden trains, the backward recomputes all logits; `linear_cross_entropy_loss`
    does not.

    Peak extra memory: the logits of a chunk (`ScoreConfig.chunk`) in hidden's dtype, in plain torch several
    fp32 copies of them; if the weight trains, its fp32 gradient (V, E) and logits of the same size.
    Raises ValueError for an unknown score name, IndexError for a label outside of the vocabulary (on a GPU, where the
    check would be a host sync, the scores of that token are NaN instead).
    """
    unknown = config.want - OPTIONAL_SCORES
    if unknown:
        raise ValueError(f"no such token score: {sorted(unknown)}; choose from {sorted(OPTIONAL_SCORES)}")
    score_rows, kept = _backend(hidden_NE, weight_VE, labels_N, config, backend)
    arguments = _arguments(hidden_NE, weight_VE, labels_N, bias_V, lora, kept)
    scores: Any = ScoreTokensFunction.apply(*arguments, config, score_rows, torch.is_grad_enabled())
    if kept is not None:
        count = labels_N.shape[0]
        scores = (None if s is None else s.new_zeros(count).index_copy(0, kept, s) for s in scores)
    return TokenScores(*scores)


def linear_cross_entropy_loss(
    hidden_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    config: ScoreConfig,
    denominator: float | torch.Tensor | None = None,
    bias_V: torch.Tensor | None = None,
    lora: LoraHead | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Computes the training loss `linear_cross_entropy(...).loss.sum() / denominator`, an fp32 scalar, and each logit
    only once.

    Arguments, dtypes and errors as there. denominator: a number, or a one-element tensor on any device, read without a
    host
    sync and without gradient; None = the number of labels that are not ignored (if there is none, the loss is NaN as
    torch's, and its gradients are zero). `config.want` is not used.
    The forward computes every gradient for an upstream gradient of 1, and the backward scales them; it can run any
    number of times. Without grad mode no gradient is computed.
    Peak extra memory, in the forward: the logits of a chunk and the gradient of hidden, in hidden's dtype; if the
    weight trains, its fp32 gradient (V, E), and logits of that size instead of a chunk's. The gradients live until the
    backward.
    """
    score_rows, kept = _backend(hidden_NE, weight_VE, labels_N, config, backend)
    arguments = _arguments(hidden_NE, weight_VE, labels_N, bias_V, lora, kept)
    if isinstance(denominator, torch.Tensor):  # .item() only on the CPU, where it is no host sync
        on_host = denominator.device.type == "cpu"
        denominator = denominator.item() if on_host else denominator.detach().reshape(()).to(hidden_NE.device)
    return LossFunction.apply(*arguments, config, score_rows, torch.is_grad_enabled(), denominator)  # pyright: ignore[reportReturnType]


def _backend(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, config: ScoreConfig, backend: Backend | None
) -> tuple[ScoreRows, torch.Tensor | None]:
    """Returns (the backend's `ScoreRows`, indices of the labels that are not ignored: in plain torch only those tokens
    are computed)."""
    if backend_for(hidden, backend) == "triton":
        from hasten.ops.linear_cross_entropy import kernel

        return kernel.score_rows, None
    return reference.score_rows, reference.labelled(labels, config, weight.shape[0])


def _arguments(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    lora: LoraHead | None,
    kept: torch.Tensor | None,
) -> tuple[Any, ...]:
    """Returns the fields of `function.Operands` and the labels, in order."""
    if kept is not None:
        hidden, labels = hidden[kept], labels[kept]
    a, b, scale = (None, None, 0.0) if lora is None else (lora.a_RE, lora.b_VR, lora.scale)
    return hidden, weight, bias, a, b, scale, labels.contiguous()


def score_logits(raw_NV: torch.Tensor, labels_N: torch.Tensor, config: ScoreConfig) -> TokenScores:
    """Computes the same scores from given raw logits (N, V), through plain autograd.

    For heads that must run their own module. The caller bounds the memory by passing few tokens at a time.
    """
    scores: Any = reference.score_logits(raw_NV, labels_N, config)
    return TokenScores(*scores)
