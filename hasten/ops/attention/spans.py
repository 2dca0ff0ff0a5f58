"""Attention masks of packed documents and padding as three numbers per token, instead of a T x T mask.

spans_BT3 (int32):
    [..., 0] first   the first key that query t attends to
    [..., 1] last    the last query that attends to key s, -1 for padding
    [..., 2] clear   the first key from which on query t attends to every key up to itself; t + 1 if not even to itself
Key s is visible to query t where first[t] <= s <= t <= last[s]. For documents `first` and `last` are redundant; padding
between tokens is in `last` only. `first` and `clear` never decrease along a sequence; the kernels use them to skip
blocks without visible keys and to skip the mask in blocks where every key is visible. Computed on the device without a
host sync.
"""

import torch


def row_spans(
    rows: tuple[int, int, torch.device],
    attention_mask_BT: torch.Tensor | None = None,
    position_ids_BT: torch.Tensor | None = None,
    document_starts_N: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Spans of a batch; None (plain causal attention) if none of the three inputs is given.

    rows: (B, T, device). attention_mask: (B, T), zero = padding, at any position. position_ids: (B or 1, T). Without a
    mask a document starts where a position is not the last one plus one, as transformers reads packed sequences. With a
    mask, where a position is not larger than that of the last real token, unless it only counts on from the padding
    before it. document_starts: offsets into the B * T
    tokens (`cu_seq_lens_q`). Returns (B, T, 3) int32.
    """
    if attention_mask_BT is None and position_ids_BT is None and document_starts_N is None:
        return None
    batch, tokens, device = rows
    index_T = torch.arange(tokens, device=device)
    real_BT = None if attention_mask_BT is None else attention_mask_BT.to(device).bool()
    starts_BT = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    if position_ids_BT is not None:
        starts_BT = starts_BT | document_starts(position_ids_BT.to(device).expand(batch, tokens), real_BT)
    if document_starts_N is not None:
        flags = torch.zeros(batch * tokens + 1, dtype=torch.bool, device=device)
        flags.index_fill_(0, document_starts_N.to(device).long(), True)
        starts_BT = starts_BT | flags[:-1].view(batch, tokens)
    first_BT = torch.where(starts_BT, index_T, 0).cummax(1).values
    # A token's document ends before the next document's start.
    starts_after = torch.nn.functional.pad(torch.where(starts_BT, index_T, tokens)[:, 1:], (0, 1), value=tokens)
    last_BT = starts_after.flip(1).cummin(1).values.flip(1) - 1
    clear_BT = first_BT
    if real_BT is not None:
        first_BT = torch.maximum(first_BT, real_BT.int().argmax(1, keepdim=True))
        last_BT = torch.where(real_BT, last_BT, -1)
        clear_BT = torch.maximum(first_BT, torch.where(real_BT, 0, index_T + 1).cummax(1).values)
    return torch.stack((first_BT, last_BT, clear_BT), -1).int()


def document_starts(position_ids_BT: torch.Tensor, real_BT: torch.Tensor | None) -> torch.Tensor:
    """Returns (B, T) bool: where a document starts, except the first of each sequence. real: False = padding; None = no
    mask given.

    transformers' `generate` gives right padding the position 0 and counts on from it, so that a new token's position
    may repeat one of the prompt. That is no start: only a document's first token has position 0 or breaks the count.
    """
    adjacent = position_ids_BT.roll(1, 1)
    if real_BT is None:
        starts = position_ids_BT != adjacent + 1
    else:
        index_T = torch.arange(position_ids_BT.shape[1], device=position_ids_BT.device)
        previous_BT = torch.where(real_BT, index_T, -1).cummax(1).values.roll(1, 1)  # the last real token before each
        before = position_ids_BT.gather(1, previous_BT.clamp(min=0))
        counts_on = (position_ids_BT == adjacent + 1) & (position_ids_BT > 0)
        starts = real_BT & (previous_BT >= 0) & (position_ids_BT <= before) & ~counts_on
    starts[:, :1] = False
    return starts


def visible_keys(tokens: int, window: int | None, spans_BT3: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Returns the dense mask (B or 1, T, T), True = visible: causal, within the window (which counts the token itself)
    and the spans."""
    query, key = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if spans_BT3 is None:
        return visible[None]
    first_BT, last_BT, _ = spans_BT3.unbind(-1)
    return visible & (key >= first_BT[:, :, None]) & (query <= last_BT[:, None])
