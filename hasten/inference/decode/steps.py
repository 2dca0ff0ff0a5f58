"""Keeps the steps of a model, one per batch bucket: what a CUDA graph has baked in decides whether a step can be used again."""

from collections import OrderedDict
from typing import Any

import torch

from hasten.inference.decode.cache import KVCache, shape_for
from hasten.inference.decode.fingerprint import fingerprint
from hasten.inference.decode.split import SplitStep
from hasten.inference.decode.step import DecodeStep

MOST = 16
"""Captured steps of a model; the one that was not used for longest goes."""
SMALL = 16
"""Sequences up to which a bucket is a power of two."""


def bucket(sequences: int) -> int:
    """Returns the batch size whose step serves `sequences`: 1, 2, 4, 8, 16, then two per power of two (24, 32, 48, 64, ...)."""
    power = 1 << (sequences - 1).bit_length()
    return power if power <= SMALL or sequences > power * 3 // 4 else power * 3 // 4


class Steps:
    """Steps and their caches. Graphs of one model share a memory pool: one runs at a time, and nothing of it is read after the
    next has run."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], tuple[KVCache, DecodeStep]] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, model: Any, sequences: int, tokens: int, dtype: torch.dtype | None) -> tuple[KVCache, DecodeStep]:
        """Returns the cache, empty, and the step for a call of `sequences`, each of up to `tokens`. dtype: of the cache, None =
        that of the keys."""
        key = (bucket(sequences), dtype, fingerprint(model))
        found = self._kept.pop(key, None)
        if found is None or found[0].shape.capacity < tokens:
            found = self._made(model, key[0], tokens, dtype)
        self._kept[key] = found
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return found

    def clear(self) -> None:
        """Frees the graphs and their memory."""
        self._kept.clear()
        self._pool = None

    def _made(self, model: Any, batch: int, tokens: int, dtype: torch.dtype | None) -> tuple[KVCache, DecodeStep]:
        shape = shape_for(model, batch, tokens, dtype)
        if shape.device.type == "cuda" and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False):  # a later call outside of inference mode writes into these tensors
            cache = KVCache(shape)
            step = SplitStep if len(set(shape.devices)) > 1 else DecodeStep
            return cache, step(model, cache, self._pool)
