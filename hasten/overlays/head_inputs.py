"""Prepares the inputs of the head: length check, kept positions, shifted labels, operands of the fused op."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from hasten.errors import InputError
from hasten.ops import LoraHead, ScoreConfig, TokenScores, score_logits
from hasten.weights import read_head

IGNORE_INDEX = ScoreConfig.ignore_index


def check_length(
    limit: int | None,
    inputs: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past: Cache | None,
    longest_document: int | None,
) -> None:
    """Raises InputError for a sequence (or packed document) longer than `limit` tokens, cached ones included."""
    if limit is None or inputs is None:
        return
    seen: Any = past.get_seq_length() if past is not None else 0
    if torch.compiler.is_compiling():
        _check_length_in_graph(limit, inputs.shape[1] + seen, position_ids, longest_document)
        return
    length = inputs.shape[1] + int(seen)
    if length <= limit:
        return
    if longest_document is not None:
        length = int(longest_document)
    elif position_ids is not None:
        length = int(position_ids.max()) + 1
    if length > limit:
        raise InputError(
            f"a sequence of {length} tokens was given to a model loaded with max_seq_length={limit}. Load it with "
            f"max_seq_length={length} or more, or shorten the input; it is never truncated silently."
        )


def _check_length_in_graph(limit: int, length: Any, position_ids: torch.Tensor | None, longest: Any) -> None:
    """Does what `check_length` does while a graph is traced: what depends on values is asserted when the graph runs."""
    if not isinstance(length, torch.Tensor) and length <= limit:
        return
    if longest is not None:
        length = longest
    elif position_ids is not None:
        length = position_ids.max() + 1
    message = f"a sequence is longer than max_seq_length={limit} tokens; load the model with a larger max_seq_length"
    if isinstance(length, torch.Tensor):
        torch._assert_async(length <= limit, message)
    elif length > limit:
        raise InputError(message)


def keep_positions(hidden_BTE: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """Selects the positions of `logits_to_keep` (a count, indices, or a mask), as transformers does."""
    if isinstance(keep, int):
        return hidden_BTE[:, -keep:] if keep else hidden_BTE
    if keep.ndim == 2 and keep.dtype == torch.bool:
        return hidden_BTE[keep]
    if keep.ndim == 2:
        return torch.take_along_dim(hidden_BTE, keep[..., None], dim=1)
    return hidden_BTE[:, keep]


def targets_of(
    hidden_BTE: torch.Tensor, labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignored: int
) -> torch.Tensor:
    """Returns the label that each position predicts, (B, T): the next token's (none at a sequence's end), or
    `shift_labels`."""
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise InputError("fused_lm_head=True needs labels or shift_labels; neither was given")
    if labels.shape[1] != hidden_BTE.shape[1]:
        raise InputError(f"labels have {labels.shape[1]} positions, the model's output has {hidden_BTE.shape[1]}")
    return F.pad(labels[:, 1:], (0, 1), value=ignored)


def shifted(
    hidden_BTE: torch.Tensor, labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns hidden states and the labels that they predict, without each sequence's last position, which predicts
    none."""
    targets = targets_of(hidden_BTE, labels, shift_labels, ignored)
    return (hidden_BTE, targets) if shift_labels is not None else (hidden_BTE[:, :-1], targets[:, :-1])


def head_operands(
    lm_head: nn.Module, training: bool, hidden: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, LoraHead | None] | str:
    """Returns (hidden in `dtype` on the head's device, weight, bias, LoRA), or the reason why the module's own forward
    must run."""
    head = read_head(lm_head, training)
    if isinstance(head, str):
        return head
    weight = head.weight.stored
    assert weight is not None
    lora = None if head.a is None or head.b is None else LoraHead(head.a, head.b, head.scale)
    return hidden.to(weight.device, dtype), weight, head.bias, lora


def score_through_module(
    head: nn.Module, hidden_NE: torch.Tensor, labels_N: torch.Tensor, config: ScoreConfig
) -> TokenScores:
    """Scores through the head's own forward, a chunk of tokens at a time; logits are recomputed in the backward
    (activation checkpointing), so the full logits never exist."""

    def score(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
        raw = head(hidden)
        scores = score_logits(raw, labels.to(raw.device), config)
        return tuple(getattr(scores, name) for name in TokenScores.__dataclass_fields__)

    parts = [
        checkpoint(score, hidden, labels, use_reentrant=False)
        for hidden, labels in zip(hidden_NE.split(config.chunk), labels_N.split(config.chunk), strict=True)
    ]
    joined: list[Any] = [None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True)]  # pyright: ignore[reportArgumentType]
    return TokenScores(*joined)
