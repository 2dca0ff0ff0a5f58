"""Reads the prompt of a call that transformers has prepared, and runs it: its keys and values go into the cache.

B sequences, P tokens in a cache that the caller gave, T tokens to run, V entries of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hasten.inference.decode.cache import KVCache
from hasten.inference.decode.context import CachedAttention
from hasten.inference.decode.step import DecodeStep
from hasten.ops.attention import row_spans
from hasten.overlays.cache_name import CACHE


@dataclass(frozen=True)
class Fed:
    """What the model is fed. ids_BT, positions_BT: of the tokens to run. mask_BS: (B, P + T), 0 = padding on the left; None = no
    padding. cached: P. dropped: columns of padding that every sequence has, which are not run."""

    ids_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask_BS: torch.Tensor | None
    cached: int = 0
    dropped: int = 0

    @property
    def slots(self) -> int:
        """Slots of the cache that the prompt takes."""
        return self.cached + self.ids_BT.shape[1]


def fed(input_ids: torch.Tensor, prepared: dict[str, Any], keeps_cache: bool) -> Fed:
    """Selects what must run, as transformers does: without what the cache holds. input_ids: the whole sequences, or with a cache
    only the new tokens (the mask is then longer). keeps_cache: the caller gets the cache, so that every slot must be in it."""
    mask, positions = prepared.get("attention_mask"), prepared["position_ids"]
    past = prepared.get(CACHE)
    cached = 0 if past is None else int(past.get_seq_length())
    skipped = (
        cached if positions.shape[1] == input_ids.shape[1] else 0
    )  # transformers makes positions as long as the mask
    dropped = 0
    if mask is not None and not cached and not keeps_cache:
        dropped = int(mask.any(0).int().argmax())
    ids = input_ids[:, skipped + dropped :]
    mask = None if mask is None else mask[:, dropped:]
    return Fed(ids, positions[:, -ids.shape[1] :].expand(ids.shape), mask, cached, dropped)


def run_prompt(model: Any, cache: KVCache, step: DecodeStep, prompt: Fed) -> torch.Tensor:
    """Runs the prompt after the P tokens that the cache holds. Returns the next token's logits (B, V), fp32."""
    device = cache.shape.device
    batch, tokens = prompt.ids_BT.shape
    mask = None if prompt.mask_BS is None else prompt.mask_BS.to(device)
    cache.begin(prompt.cached, None if mask is None else (mask == 0).sum(1), batch)
    spans = None
    if mask is not None and not prompt.cached:
        spans = row_spans((batch, tokens, device), mask, None, None)
    positions = prompt.positions_BT.to(device)
    context = CachedAttention(cache, prompt=not prompt.cached, spans_BT3=spans)
    outputs = model(
        input_ids=prompt.ids_BT.to(device),
        position_ids=positions,
        attention_context=context,
        use_cache=False,
        logits_to_keep=1,
    )
    cache.advance(tokens, batch)
    step.position_B1.zero_()
    step.position_B1[:batch] = positions[:, -1:] + 1
    return outputs.logits[:, -1].float()
