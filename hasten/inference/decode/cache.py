"""The KV cache of one batch: blocks of tokens, allocated as the sequences grow and never copied."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from hasten.ops.decode_attention import BLOCK, CacheView
from hasten.overlays.precision import compute_dtype


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
        self._counts = torch.zeros(shape.batch * shape.heads, dtype=torch.int32, device=shape.device)

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
        blocks = [block[layer] for block in self._blocks]
        return CacheView(blocks, self._tables[layer], self.slots_B, self.starts_B, self._counts)

    def row(self, index: int) -> "CacheRow":
        """Returns the part of one sequence, for a forward of that sequence alone."""
        return CacheRow(self, index)


@dataclass(frozen=True)
class CacheRow:
    """One sequence of a `KVCache`, through views of its blocks. slots_B, starts_B: (1,), views as well."""

    cache: KVCache
    index: int

    @property
    def slots_B(self) -> torch.Tensor:
        return self.cache.slots_B[self._part]

    @property
    def starts_B(self) -> torch.Tensor:
        return self.cache.starts_B[self._part]

    @property
    def _part(self) -> slice:
        return slice(self.index, self.index + 1)

    def view(self, layer: int) -> CacheView:
        whole = self.cache.view(layer)
        blocks = [block[:, self._part] for block in whole.blocks]
        offset = self.index * blocks[0].stride(1) * blocks[0].itemsize
        return replace(whole, blocks=blocks, table=whole.table + offset, slots_B=self.slots_B, starts_B=self.starts_B)


def shape_for(model: Any, batch: int) -> CacheShape:
    """Returns the shape of the cache of `batch` sequences of a causal LM with hasten's overlays."""
    config = model.config.get_text_config()
    attention = next(m for m in model.modules() if hasattr(m, "k_proj"))
    weight = model.get_input_embeddings().weight
    return CacheShape(
        layers=config.num_hidden_layers,
        batch=batch,
        heads=attention.k_proj.out_features // attention.head_dim,
        channels=attention.head_dim,
        capacity=model.overlay_config.max_seq_length or config.max_position_embeddings,
        dtype=compute_dtype(weight),
        device=weight.device,
    )
