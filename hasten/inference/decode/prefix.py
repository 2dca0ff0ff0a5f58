"""Continues from transformers' `DynamicCache`, and writes what a call has added back into it.

The cache stays transformers' own object, so that it can be read, cropped, copied and given to any model call. It is copied
in and out once per call.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hasten.inference.decode.cache import KVCache
from hasten.overlays.cache_name import CACHE


def unserved_cache(past: Any, windows: list[int | None], sequences: int) -> str | None:
    """Returns why transformers must continue from this cache, None if `load` can copy it. windows: of each layer, None = all
    tokens. sequences: of the call."""
    if type(past) is not DynamicCache or past.offloading:
        return f"{CACHE} is a {type(past).__name__}{' with offloading' if type(past) is DynamicCache else ''}"
    tokens, layers = int(past.get_seq_length()), list[Any](past.layers)
    if not tokens:
        return None
    if len(layers) != len(windows):
        return f"{CACHE} has {len(layers)} layers, the model {len(windows)}"
    for layer, window in zip(layers, windows, strict=True):
        needed = tokens if window is None else min(tokens, window - 1)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or getattr(layer, "record_past", False):
            return f"{CACHE} has layers of type {type(layer).__name__}"
        if layer.keys is None or len(layer.keys) != sequences or int(layer.get_seq_length()) != tokens:
            return f"{CACHE} holds another number of sequences or tokens"
        if layer.keys.shape[2] < needed:
            return f"{CACHE} holds fewer tokens than a window"
    return None


def load(past: DynamicCache, cache: KVCache) -> None:
    """Copies the keys and values into the cache, whose blocks are reserved."""
    end = int(past.get_seq_length())
    for index, layer in enumerate(list[Any](past.layers)):
        cache.load(index, layer.keys[:, :, -end:], layer.values[:, :, -end:], end)


def append(past: DynamicCache, cache: KVCache, sequences: int, end: int, dtype: torch.dtype) -> None:
    """Adds what the cache holds beyond `past`, up to slot `end`, and frees the cache layer by layer."""
    first = int(past.get_seq_length())
    for index in range(cache.shape.layers):
        keys, values = cache.read(index, sequences, first, end)
        cache.free(index)
        past.update(keys.to(dtype), values.to(dtype), index)
