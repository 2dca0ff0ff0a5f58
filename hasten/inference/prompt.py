"""Reads the prompt of a `generate` call: its mask, the sequences' lengths, and left-padding.

Shapes: B sequences, T positions of the prompt (padding included), S of the mask (T, or more with a cache), E hidden
size.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hasten.errors import InputError
from hasten.overlays.cache_name import CACHE


@dataclass
class Prompt:
    """tensors: argument name -> every tensor of the call with one entry per position: ids or positions (B, T),
    embeddings (B, T, E). mask_BS: int64, 1 = token, 0 = padding. width: T. cached: positions in a cache passed by the
    caller."""

    tensors: dict[str, torch.Tensor]
    mask_BS: torch.Tensor
    width: int
    cached: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, cached ones included, without padding."""
        return int(self.mask_BS.sum(1).max())

    def needs_realigning(self) -> bool:
        """Returns whether a sequence has padding after its first token (with a cache: after its last)."""
        if self.cached:
            return bool((self.mask_BS[:, -1] == 0).any())
        return bool((self.mask_BS[:, 1:] < self.mask_BS[:, :-1]).any())

    def left_padded(self) -> "Prompt":
        """Returns the prompt with each sequence's padding moved to its left. Shapes stay.

        Raises InputError with a cache, which fixes the positions of earlier tokens.
        """
        if self.cached:
            raise InputError(
                f"sequences with padding after their last token were given with {CACHE}, whose positions "
                "are fixed. Pad the new tokens on the left, or pass the whole sequences without a cache."
            )
        order_BT = self.mask_BS.argsort(dim=1, stable=True)
        moved = {name: _reorder(tensor, order_BT) for name, tensor in self.tensors.items()}
        return Prompt(moved, self.mask_BS.gather(1, order_BT), self.width, self.cached)


def _reorder(tensor: torch.Tensor, order_BT: torch.Tensor) -> torch.Tensor:
    """Gathers a (B or 1, T) or (B, T, E) tensor's positions in `order_BT`."""
    order = order_BT.to(tensor.device)
    if tensor.ndim == 2:
        return tensor.expand(order.shape).gather(1, order)
    return tensor.take_along_dim(order[..., None], dim=1)


def read_prompt(named: dict[str, Any], pad_token_id: Any, eos_token_id: Any) -> Prompt | None:
    """Finds the prompt among `named`, the arguments of a `generate` call by name; None if the call has no prompt.

    Without attention_mask, padding is inferred as transformers does: where ids equal `pad_token_id`, and only if that
    is not EOS. Raises InputError for a prompt of another type or shape, a mask that does not fit it, and sequences that
    are padding only.
    """
    main = next((n for n in ("inputs_embeds", "inputs", "input_ids") if named.get(n) is not None), None)
    if main is None:
        return None
    ids = named[main]
    if not isinstance(ids, torch.Tensor):
        raise InputError(
            f"generate was given a {type(ids).__name__} as {main}; it takes a tensor of shape (batch, positions). "
            "Pass a tokenizer's output as generate(**tokenizer(..., return_tensors='pt'))."
        )
    if ids.ndim != (3 if main == "inputs_embeds" else 2):
        wanted = "(batch, positions, hidden size)" if main == "inputs_embeds" else "(batch, positions)"
        raise InputError(f"{main} has shape {tuple(ids.shape)}; generate takes {wanted}.")
    mask = named.get("attention_mask")
    cache = named.get(CACHE)
    cached = int(cache.get_seq_length()) if cache is not None else 0
    if mask is None:
        mask = _inferred_mask(ids, pad_token_id, eos_token_id)
    elif mask.ndim != 2:
        return None  # the caller's own mask, which transformers checks
    elif len(mask) != len(ids) or mask.shape[1] != ids.shape[1] + (cached if mask.shape[1] > ids.shape[1] else 0):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, {main} has {tuple(ids.shape[:2])}"
            f"{f' and the cache holds {cached} positions' if cached else ''}; one mask entry per position is needed."
        )
    prompt = Prompt(_by_position(named, ids), (mask != 0).long(), ids.shape[1], cached)
    empty = [index for index, length in enumerate(prompt.mask_BS.sum(1).tolist()) if length == 0]
    if empty:
        raise InputError(
            f"sequences {empty} of {main} are padding only, so generate has no token to continue from. Leave them out, or start "
            "them with the tokenizer's bos_token."
        )
    return prompt


def _inferred_mask(ids: torch.Tensor, pad: Any, eos: Any) -> torch.Tensor:
    """Returns (B, T), as `GenerationMixin._prepare_attention_mask_for_generation`."""
    ones = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)
    stops = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    if pad is None or ids.ndim != 2 or int(pad) in stops:
        return ones
    return ids.ne(int(pad)).long()


def _by_position(named: dict[str, Any], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the arguments that hold one entry per position of `ids`. Raises InputError for one of another length."""
    found = {}
    for name in ("inputs", "input_ids", "inputs_embeds", "position_ids", "token_type_ids"):
        tensor = named.get(name)
        if tensor is None or tensor.shape[1:2] == (0,):
            continue
        if tensor.shape[1] != ids.shape[1] or tensor.shape[0] not in (1, len(ids)):
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}, the prompt has {len(ids)} sequences of {ids.shape[1]} tokens."
            )
        found[name] = tensor
    return found
