"""Who sees whom in rows that hold several documents or padding, as three numbers a token instead of a T x T mask.

spans_BT3 (int32):
    [..., 0] first   the first key that query t may see
    [..., 1] last    the last query that may see key s, -1 where none may
    [..., 2] clear   from this key on query t sees every one up to itself; t + 1 where it does not even see itself
Key s is visible to query t where first[t] <= s <= t <= last[s]. Of documents `first` and `last` say the same; `last` alone
tells of padding between tokens. `first` and `clear` never decrease along a row and only save the kernels work: blocks that
need no visit, blocks that need no mask. Made on the device, without looking at it from the host.
"""

import torch


def row_spans(
    rows: tuple[int, int, torch.device],
    attention_mask_BT: torch.Tensor | None = None,
    position_ids_BT: torch.Tensor | None = None,
    document_starts_N: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Spans of `rows` = (B, T, device), or None where none of the three is given: plain causal rows.

    attention_mask: (B, T), zero = padding, wherever it stands. position_ids: (B or 1, T); a document starts where they
    do not go on by one, as in transformers' packed rows; beside a mask (which makes transformers overlook packing) where
    they do not grow from one real token to the next. document_starts: offsets into the B * T tokens (`cu_seq_lens_q`).
    Returns (B, T, 3) int32.
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
    # A token's document ends before the next start at its right.
    starts_after = torch.nn.functional.pad(torch.where(starts_BT, index_T, tokens)[:, 1:], (0, 1), value=tokens)
    last_BT = starts_after.flip(1).cummin(1).values.flip(1) - 1
    clear_BT = first_BT
    if real_BT is not None:
        first_BT = torch.maximum(first_BT, real_BT.int().argmax(1, keepdim=True))
        last_BT = torch.where(real_BT, last_BT, -1)
        clear_BT = torch.maximum(first_BT, torch.where(real_BT, 0, index_T + 1).cummax(1).values)
    return torch.stack((first_BT, last_BT, clear_BT), -1).int()


def document_starts(position_ids_BT: torch.Tensor, real_BT: torch.Tensor | None) -> torch.Tensor:
    """(B, T) bool: where a document starts, a row's first one left out. real: True = no padding; None = no mask at all."""
    before = position_ids_BT.roll(1, 1)
    if real_BT is None:
        starts = position_ids_BT != before + 1
    else:
        index_T = torch.arange(position_ids_BT.shape[1], device=position_ids_BT.device)
        previous_BT = torch.where(real_BT, index_T, -1).cummax(1).values.roll(1, 1)  # the last real token before each
        before = position_ids_BT.gather(1, previous_BT.clamp(min=0))
        starts = real_BT & (previous_BT >= 0) & (position_ids_BT <= before)
    starts[:, :1] = False
    return starts


def visible_keys(tokens: int, window: int | None, spans_BT3: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The dense mask, (B or 1, T, T) bool, True = visible: causal, in the window (the token itself counts), in the spans."""
    query, key = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if spans_BT3 is None:
        return visible[None]
    first_BT, last_BT, _ = spans_BT3.unbind(-1)
    return visible & (key >= first_BT[:, :, None]) & (query <= last_BT[:, None])
