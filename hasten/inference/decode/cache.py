"""The KV cache of one batch: blocks of tokens per layer, allocated as the sequences grow and never copied."""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from hasten.ops.decode_attention import BLOCK, CacheView, write_cache


@dataclass(frozen=True)
class CacheShape:
    """batch: sequences. capacity: most tokens per sequence. channels: of a head."""

    layers: int
    batch: int
    heads: int
    channels: int
    capacity: int
    dtype: torch.dtype
    device: torch.device


class KVCache:
    """Keys and values of all layers. slots_B: (B,) int32, cached tokens, padding included. starts_B: (B,) int32, padding on the
    left of each sequence. The addresses of these tensors and of the tables never change, so that CUDA graphs read them.

    A call may have fewer sequences than `shape.batch`. The others are empty: `slots_B` starts at 0, so that they read only what
    they write themselves."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self._blocks: list[list[torch.Tensor]] = [[] for _ in range(shape.layers)]
        count = -(-shape.capacity // BLOCK)
        self._tables = torch.zeros(shape.layers, count, dtype=torch.int64, device=shape.device)
        self.slots_B, self.starts_B = (
            torch.zeros(shape.batch, dtype=torch.int32, device=shape.device) for _ in range(2)
        )

    def reserve(self, tokens: int) -> None:
        """Allocates blocks until each sequence can hold `tokens`. Nothing that is cached moves."""
        shape = self.shape
        while (count := len(self._blocks[0])) * BLOCK < tokens:
            size = (2, shape.batch, shape.heads, BLOCK, shape.channels)
            for blocks in self._blocks:
                blocks.append(torch.empty(size, dtype=shape.dtype, device=shape.device))
            addresses = [blocks[count].data_ptr() for blocks in self._blocks]
            self._tables[:, count] = torch.tensor(addresses, dtype=torch.int64).to(shape.device)

    def release(self) -> None:
        """Frees the blocks."""
        for blocks in self._blocks:
            blocks.clear()

    def view(self, layer: int) -> CacheView:
        return CacheView(self._blocks[layer], self._tables[layer], self.slots_B, self.starts_B)

    def begin(self, tokens: int, starts_B: torch.Tensor | None, batch: int) -> None:
        """Sets the counters of a call of `batch` sequences with `tokens` in the cache. starts_B: None = no padding."""
        for counter, value in ((self.slots_B, tokens), (self.starts_B, 0 if starts_B is None else starts_B)):
            counter.zero_()
            counter[:batch] = value

    def load(self, layer: int, keys_BKSD: torch.Tensor, values_BKSD: torch.Tensor, end: int) -> None:
        """Copies S tokens of a layer to the slots before `end`, which must be reserved. The slots before those are zeroed: a
        window hides them, and kernels multiply what is hidden by 0."""
        for block in self._blocks[layer]:
            block.zero_()
        first = torch.full_like(self.slots_B, end - keys_BKSD.shape[2])
        view = replace(self.view(layer), slots_B=first)
        write_cache(*(self.padded(x.transpose(1, 2)) for x in (keys_BKSD, values_BKSD)), view)

    def read(self, layer: int, batch: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values (batch, K, end - first, D) of a layer's slots first .. end - 1, copied."""
        skipped = first // BLOCK
        used = self._blocks[layer][skipped : -(-end // BLOCK)]
        both = torch.cat([block[:, :batch] for block in used], dim=3)
        keys, values = both[:, :, :, first - skipped * BLOCK : end - skipped * BLOCK].unbind(0)
        return keys, values

    def free(self, layer: int) -> None:
        """Frees the blocks of one layer; the others stay readable."""
        self._blocks[layer].clear()

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Appends zeros to the first dimension, up to `shape.batch` sequences."""
        missing = self.shape.batch - len(x)
        return F.pad(x, (*(0, 0) * (x.ndim - 1), 0, missing)) if missing else x
