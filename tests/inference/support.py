"""What the tests of generation share: overlaid and stock twins, ragged prompts, padding."""

from typing import Any

import torch

from hasten.methods import CausalLMMethods
from hasten.patching import apply, plan
from hasten.testing import tiny_model

BOS, EOS, PAD = 1, 2, 0
LENGTHS = (3, 17, 9, 1, 12, 5, 20, 8)


def twins(model_type: str, max_seq_length: int | None = None, **changes: Any) -> tuple[Any, Any]:
    """(with overlays and hasten's methods, stock transformers), of equal weights.

    The head is not tied: a tied one mostly repeats the last token, whatever the layers do.
    """
    changes = {"tie_word_embeddings": False, **changes}
    ours, stock = tiny_model(model_type, **changes), tiny_model(model_type, **changes)
    apply(ours, plan(ours, max_seq_length=max_seq_length), methods=CausalLMMethods)
    return ours, stock


def prompts(count: int = len(LENGTHS), seed: int = 0) -> list[torch.Tensor]:
    """Rows of ragged lengths, ids of ordinary tokens after a BOS."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(6, 260, (length,), generator=generator) for length in LENGTHS[:count]]
    for row in rows:
        row[0] = BOS
    return rows


def padded(rows: list[torch.Tensor], side: str, pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (B, T). side: "left", "right" or "both" (half of a row's padding on each side)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        room = width - len(row)
        start = {"left": room, "right": 0, "both": room // 2}[side]
        ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    return ids, mask


def until_eos(new: torch.Tensor) -> list[int]:
    """The generated ids of one row up to and including the first EOS."""
    ids = new.tolist()
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids
