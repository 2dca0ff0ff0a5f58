"""The loop of the fused head over chunks of tokens, and the two autograd Functions that run it, for both backends.

Per chunk: one matmul writes the logits, the backend's `score_rows` turns them into scores and overwrites them with
their gradient, and matmuls turn that into the gradients of the operands.
- `LossFunction` computes every gradient in its forward, for an upstream gradient of 1, and its backward only scales
them. So
  logits are computed once.
- `ScoreTokensFunction` has one unknown upstream gradient per token. If only the hidden states need a gradient, it does
the
  same, with one factor per token; otherwise its backward recomputes the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.precision import add_matmul, at_least_fp32

if TYPE_CHECKING:
    from hasten.ops.linear_cross_entropy import ScoreConfig

SCORES = ("loss", "log_prob", "entropy", "is_top1", "log_sum_sq_probs", "mean_logits")
Gradients = list[torch.Tensor | None]


class Upstream(NamedTuple):
    """The upstream gradients of the scores, each (N,) or None. Of a loss alone: `Upstream(ones)`."""

    d_loss: torch.Tensor | None = None
    d_log_prob: torch.Tensor | None = None
    d_entropy: torch.Tensor | None = None


class Operands(NamedTuple):
    """hidden (N, E), weight (V, E), bias (V,), LoRA's a (R, E), b (V, R) and scale; the first five may require
    gradients."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    scale: float


class ScoreRows(Protocol):
    def __call__(
        self,
        raw_NV: torch.Tensor,
        labels_N: torch.Tensor,
        config: ScoreConfig,
        scores: torch.Tensor | None,
        upstream: Upstream | None,
    ) -> torch.Tensor | None:
        """Scores one chunk of raw logits.

        scores: (6, N), filled in the order of SCORES if given. upstream: if given, returns the gradient of raw (N, V),
        which may overwrite raw.
        """
        ...


def tokens_at_once(config: ScoreConfig, hidden_NE: torch.Tensor, weight_trains: bool) -> int:
    """Returns the tokens per chunk: `config.chunk`; if the weight trains, at least as many as make the logits as large
    as its fp32 gradient.

    Every chunk reads and writes that gradient once, so few and large chunks are faster: at this size that traffic
    takes a tenth of the matmul's time on an H200, and the logits take no more memory than the gradient.
    """
    return max(config.chunk, 4 * hidden_NE.shape[1] // hidden_NE.element_size()) if weight_trains else config.chunk


def score_chunks(
    head: Operands,
    labels: torch.Tensor,
    config: ScoreConfig,
    score_rows: ScoreRows,
    scores: torch.Tensor | None,
    upstream: Upstream | None,
    needs: tuple[bool, ...],
) -> Gradients:
    """Fills `scores` if given; with `upstream` returns the gradients of the first five operands.

    The gradient of hidden is in hidden's dtype, the others, summed over chunks, in fp32. needs: which of them to
    compute.
    """
    hidden, scale = head.hidden, head.scale
    weight, bias, a, b = (None if t is None else t.to(hidden.dtype) for t in head[1:5])
    assert weight is not None
    d_hidden = torch.empty_like(hidden) if needs[0] and upstream is not None else None
    d_weight = d_bias = d_a = d_b = None
    count, words = hidden.shape[0], weight.shape[0]
    size = min(tokens_at_once(config, hidden, needs[1] and upstream is not None), max(count, 1))
    # On a GPU rows are padded to 16 bytes, so that cuBLAS runs at full speed with a vocabulary of any size. On a CPU torch's
    # bf16 matmul (oneDNN) reads past the end of such rows, and NaN in uninitialised memory would reach the gradients.
    logits = hidden.new_empty(size, -(-words // 8) * 8 if hidden.is_cuda else words)[:, :words]
    for start in range(
        0, max(count, 1), size
    ):  # without tokens: one empty chunk, so that gradients are zeros and not None
        part = slice(start, min(start + size, count))
        h = hidden[part]
        raw = logits[: h.shape[0]]
        if bias is None:
            torch.mm(h, weight.T, out=raw)
        else:
            torch.addmm(bias, h, weight.T, out=raw)
        low = None if a is None else h @ a.T
        if low is not None and b is not None:
            raw.addmm_(low, b.T, alpha=scale)
        given = None if upstream is None else Upstream(*(None if g is None else g[part] for g in upstream))
        d_raw = score_rows(raw, labels[part], config, None if scores is None else scores[:, part], given)
        if d_raw is None:
            continue
        d_low = None if b is None else (d_raw @ b) * scale
        if d_hidden is not None:
            torch.mm(d_raw, weight, out=d_hidden[part])
            if d_low is not None and a is not None:
                d_hidden[part].addmm_(d_low, a)
        if needs[1]:
            d_weight = add_matmul(d_weight, d_raw.T, h)
        if needs[2]:
            column_sums = d_raw.sum(0, dtype=at_least_fp32(d_raw[:0]).dtype)
            d_bias = column_sums if d_bias is None else d_bias.add_(column_sums)
        if needs[3] and d_low is not None:
            d_a = add_matmul(d_a, d_low.T, h)
        if needs[4] and low is not None:
            d_b = add_matmul(d_b, d_raw.T, low * scale)
    return [d_hidden, d_weight, d_bias, d_a, d_b]


def _scaled(unit: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns unit * factor in `dtype`, multiplied in at least fp32 and rounded once. factor: fp32; at least 1-d, else
    torch rounds it."""
    return torch.mul(unit, factor, out=torch.empty_like(unit, dtype=dtype))


def _empty_scores(hidden: torch.Tensor) -> torch.Tensor:
    return at_least_fp32(hidden[:0]).new_empty(len(SCORES), hidden.shape[0])


class ScoreTokensFunction(torch.autograd.Function):
    """Per-token scores. Saves its inputs; if only the hidden states need a gradient, also theirs for an upstream
    gradient of 1."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        operands, (labels, config, score_rows, grad_enabled) = Operands(*args[:6]), args[6:]
        ctx.set_materialize_grads(False)
        scores = _empty_scores(operands.hidden)
        unit = grad_enabled and ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:5])
        upstream = Upstream(torch.ones_like(scores[0])) if unit else None
        d_unit = score_chunks(operands, labels, config, score_rows, scores, upstream, ctx.needs_input_grad)[0]
        ctx.save_for_backward(*operands[:5], labels, d_unit)
        ctx.scale, ctx.config, ctx.score_rows = operands.scale, config, score_rows
        outputs = tuple(scores[k] if k < 2 or name in config.want else None for k, name in enumerate(SCORES))
        ctx.mark_non_differentiable(*(o for o in outputs[3:] if o is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        *saved, labels, d_unit = ctx.saved_tensors
        d_loss, d_log_prob, d_entropy = (None if g is None else g.contiguous() for g in grads[:3])
        smoothed = bool(ctx.config.label_smoothing) and d_log_prob is not None
        if d_unit is not None and d_entropy is None and not smoothed:
            # d_unit is for an upstream gradient of 1 on the loss; without smoothing log_prob is minus the loss.
            factor = torch.zeros_like(labels, dtype=torch.float32) if d_loss is None else d_loss
            factor = factor if d_log_prob is None else factor - d_log_prob
            return _scaled(d_unit, factor[:, None], d_unit.dtype), *(None,) * 9
        upstream = Upstream(d_loss, d_log_prob, d_entropy)
        operands = Operands(*saved, scale=ctx.scale)
        gradients = score_chunks(operands, labels, ctx.config, ctx.score_rows, None, upstream, ctx.needs_input_grad)
        like = zip(gradients, saved, strict=True)
        return *(None if g is None else g.to(t.dtype) for g, t in like), *(None,) * 5


class LossFunction(torch.autograd.Function):
    """sum of the tokens' losses / denominator. Saves the gradients of the sum: hidden's in its dtype, the others in
    fp32."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        operands, (labels, config, score_rows, grad_enabled, denominator) = Operands(*args[:6]), args[6:]
        scores = _empty_scores(operands.hidden)
        needs = tuple(grad_enabled and need for need in ctx.needs_input_grad[:5])
        upstream = Upstream(torch.ones_like(scores[0])) if any(needs) else None
        gradients = score_chunks(operands, labels, config, score_rows, scores, upstream, needs)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in operands[:5]]
        ctx.denominator = denominator
        if denominator is None:
            denominator = (labels != config.ignore_index).sum()
            ctx.denominator = denominator.clamp(
                min=1
            )  # all labels ignored: the loss is NaN, its gradients zero, as torch's
        return scores[0].sum() / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor) -> Any:
        factor = (d_total / ctx.denominator).view(1)
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else _scaled(g, factor, dtype) for g, dtype in gradients), *(None,) * 6
