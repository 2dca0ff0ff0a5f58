"""Small helpers of the head: which rows count, how long they are, in which dtype the head multiplies."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from hasten.errors import InputError
from hasten.ops import ScoreConfig, TokenScores, score_logits

IGNORED = -100


def check_length(
    limit: int | None,
    rows: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past: Cache | None,
    longest_document: int | None,
) -> None:
    """Raises InputError where a row (or, in packed rows, a document) is longer than `limit` tokens, the cache included."""
    if limit is None or rows is None:
        return
    seen = int(past.get_seq_length()) if past is not None else 0
    length = rows.shape[1] + seen
    if length <= limit:
        return
    if longest_document is not None:
        length = int(longest_document)
    elif position_ids is not None:
        length = int(position_ids.max()) + 1
    if length > limit:
        raise InputError(
            f"a sequence of {length} tokens was given to a model loaded with max_seq_length={limit}. Load it with "
            f"max_seq_length={length} or more, or shorten the input; nothing is cut off silently."
        )


def keep_positions(hidden_BTE: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The positions that `logits_to_keep` asks for, in all the forms that transformers gives it."""
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
    """The label that each position predicts, (B, T): the next one, ignored at a row's end, unless the labels come shifted."""
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
    """Hidden states beside the labels they predict, without the positions at the rows' ends, which predict none."""
    targets = targets_of(hidden_BTE, labels, shift_labels, ignored)
    return (hidden_BTE, targets) if shift_labels is not None else (hidden_BTE[:, :-1], targets[:, :-1])


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """autocast's dtype where it is on, else the stream's; a head that trains in fp32 is rounded to it."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def score_through_module(
    head: nn.Module, hidden_NE: torch.Tensor, labels_N: torch.Tensor, rule: ScoreConfig
) -> TokenScores:
    """Scores through the head's own forward, some rows at a time; each chunk's logits are recomputed in the backward."""

    def score(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
        raw = head(hidden)
        scores = score_logits(raw, labels.to(raw.device), rule)
        return tuple(getattr(scores, name) for name in TokenScores.__dataclass_fields__)

    parts = [
        checkpoint(score, hidden, labels, use_reentrant=False)
        for hidden, labels in zip(hidden_NE.split(rule.chunk), labels_N.split(rule.chunk), strict=True)
    ]
    joined: list[Any] = [None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True)]  # pyright: ignore[reportArgumentType]
    return TokenScores(*joined)
