"""The KV cache of one batch: blocks of tokens, allocated as the sequences grow and never copied."""

from dataclasses import dataclass

import torch

from hasten.ops.decode_attention import BLOCK, CacheView


@dataclass(frozen=True)
class CacheShape:
    """capacity: most tokens per sequence. channels: of a head."""

    layers: int
    batch: int
    heads: int
    channels: int
    capacity: int
    dtype: torch.dtype
    device: torch.device


class KVCache:
    """Keys and values of all layers. slots_B: (B,) int32, cached tokens, padding included. starts_B: (B,) int32, padding on the
    left of each sequence. The addresses of these tensors and of the tables never change, so that CUDA graphs read them."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self._blocks: list[torch.Tensor] = []
        count = -(-shape.capacity // BLOCK)
        self._tables = torch.zeros(shape.layers, count, dtype=torch.int64, device=shape.device)
        self.slots_B, self.starts_B = (
            torch.zeros(shape.batch, dtype=torch.int32, device=shape.device) for _ in range(2)
        )

    def reserve(self, tokens: int) -> None:
        """Allocates blocks until each sequence can hold `tokens`. Nothing that is cached moves."""
        shape = self.shape
        while len(self._blocks) * BLOCK < tokens:
            size = (shape.layers, 2, shape.batch, shape.heads, BLOCK, shape.channels)
            block = torch.empty(size, dtype=shape.dtype, device=shape.device)
            addresses = [layer.data_ptr() for layer in block]
            self._tables[:, len(self._blocks)] = torch.tensor(addresses, dtype=torch.int64).to(shape.device)
            self._blocks.append(block)

    def release(self) -> None:
        """Frees the blocks."""
        self._blocks.clear()

    def view(self, layer: int) -> CacheView:
        return CacheView([block[layer] for block in self._blocks], self._tables[layer], self.slots_B, self.starts_B)
