"""The KV cache of one batch: blocks of tokens per layer, allocated as the sequences grow and never copied."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from hasten.ops.decode_attention import BLOCK, LARGEST, CacheView, write_cache
from hasten.overlays import AttentionOverlay
from hasten.overlays.precision import compute_dtype


@dataclass(frozen=True)
class CacheShape:
    """batch: sequences. capacity: most tokens per sequence. channels: of a head. dtype: of the blocks; int8 and float8_e4m3fn are
    quantised, with a scale per token and head. device: of the ids. devices: of each layer, empty = `device`."""

    layers: int
    batch: int
    heads: int
    channels: int
    capacity: int
    dtype: torch.dtype
    device: torch.device
    devices: tuple[torch.device, ...] = ()


class _Place:
    """What one device holds besides the blocks: tables of their addresses, a row per layer of `layers`, and the counters."""

    def __init__(self, shape: CacheShape, device: torch.device, layers: list[int]) -> None:
        self.device, self.layers = device, layers
        count = -(-shape.capacity // BLOCK)
        self.tables, self.scale_tables = (
            torch.zeros(len(layers), count, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.slots_B, self.starts_B = (torch.zeros(shape.batch, dtype=torch.int32, device=device) for _ in range(2))
        self.counts = torch.zeros(shape.batch * shape.heads, dtype=torch.int32, device=device)


class KVCache:
    """Keys and values of all layers. slots_B: (B,) int32, cached tokens, padding included. starts_B: (B,) int32, padding on the
    left of each sequence. The addresses of these tensors and of the tables never change, so that CUDA graphs read them.

    A call may have fewer sequences than `shape.batch`. The others are empty: `slots_B` starts at 0, so that they read only what
    they write themselves. Where layers are on several devices, each has its own counters; `slots_B` and `starts_B` are those of `shape.device`."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self._is_quantised = shape.dtype in LARGEST
        self._blocks, self._scales = ([[] for _ in range(shape.layers)] for _ in range(2))
        devices = shape.devices or (shape.device,) * shape.layers
        self._places = [
            _Place(shape, device, [layer for layer, own in enumerate(devices) if own == device])
            for device in dict.fromkeys((shape.device, *devices))
        ]
        self._place_of = {layer: (place, row) for place in self._places for row, layer in enumerate(place.layers)}

    @property
    def slots_B(self) -> torch.Tensor:
        return self._places[0].slots_B

    @property
    def starts_B(self) -> torch.Tensor:
        return self._places[0].starts_B

    @property
    def counters(self) -> list[torch.Tensor]:
        """`slots_B` of each device."""
        return [place.slots_B for place in self._places]

    def reserve(self, tokens: int) -> None:
        """Allocates blocks until each sequence can hold `tokens`. Nothing that is cached moves."""
        shape = self.shape
        size = (2, shape.batch, shape.heads, BLOCK, shape.channels)
        while (count := len(self._blocks[0])) * BLOCK < tokens:
            for place in self._places:
                self._append(self._blocks, place, place.tables[:, count], size, shape.dtype)
                if self._is_quantised:
                    self._append(self._scales, place, place.scale_tables[:, count], size[:-1], torch.float32)

    def _append(
        self,
        kept: list[list[torch.Tensor]],
        place: _Place,
        column: torch.Tensor,
        size: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        made = [torch.empty(size, dtype=dtype, device=place.device) for _ in place.layers]
        column.copy_(torch.tensor([block.data_ptr() for block in made], dtype=torch.int64))
        for layer, block in zip(place.layers, made, strict=True):
            kept[layer].append(block)

    def release(self) -> None:
        """Frees the blocks."""
        for layer in range(self.shape.layers):
            self.free(layer)

    def free(self, layer: int) -> None:
        """Frees the blocks of one layer; the others stay readable."""
        self._blocks[layer].clear()
        self._scales[layer].clear()

    def view(self, layer: int) -> CacheView:
        place, row = self._place_of[layer]
        view = CacheView(self._blocks[layer], place.tables[row], place.slots_B, place.starts_B, place.counts)
        if not self._is_quantised:
            return view
        return replace(view, scales=self._scales[layer], scale_table=place.scale_tables[row])

    def row(self, index: int) -> "CacheRow":
        """Returns the part of one sequence, for a forward of that sequence alone."""
        return CacheRow(self, index)

    def begin(self, tokens: int, starts_B: torch.Tensor | None, batch: int) -> None:
        """Sets the counters of a call of `batch` sequences with `tokens` in the cache. starts_B: None = no padding."""
        for place in self._places:
            for counter, value in ((place.slots_B, tokens), (place.starts_B, 0 if starts_B is None else starts_B)):
                counter.zero_()
                counter[:batch] = value

    def advance(self, tokens: int, batch: int | None = None) -> None:
        """Counts `tokens` more in each sequence. batch: in the first ones only."""
        for slots_B in self.counters:
            slots_B[:batch] += tokens

    def load(self, layer: int, keys_BKSD: torch.Tensor, values_BKSD: torch.Tensor, end: int) -> None:
        """Copies S tokens of a layer to the slots before `end`, which must be reserved. The slots before those are zeroed: a
        window hides them, and kernels multiply what is hidden by 0."""
        for block in (*self._blocks[layer], *self._scales[layer]):
            block.zero_()
        view = self.view(layer)
        first = torch.full_like(view.slots_B, end - keys_BKSD.shape[2])
        keys, values = (self.padded(x.to(first.device).transpose(1, 2)) for x in (keys_BKSD, values_BKSD))
        write_cache(keys, values, replace(view, slots_B=first))

    def read(self, layer: int, batch: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values (batch, K, end - first, D) of a layer's slots first .. end - 1, copied; in fp32 if they are
        quantised."""
        used = slice(first // BLOCK, -(-end // BLOCK))
        both = torch.cat([block[:, :batch] for block in self._blocks[layer][used]], dim=3)
        if self._is_quantised:
            both = both.float() * torch.cat([one[:, :batch] for one in self._scales[layer][used]], dim=3)[..., None]
        keys, values = both[:, :, :, first - used.start * BLOCK : end - used.start * BLOCK].unbind(0)
        return keys, values

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Appends zeros to the first dimension, up to `shape.batch` sequences."""
        missing = self.shape.batch - len(x)
        return F.pad(x, (*(0, 0) * (x.ndim - 1), 0, missing)) if missing else x


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

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def view(self, layer: int) -> CacheView:
        whole = self.cache.view(layer)
        blocks, scales = ([block[:, self._part] for block in kept] for kept in (whole.blocks, whole.scales))
        tables = []
        for first, table in ((blocks, whole.table), (scales, whole.scale_table)):
            offset = self.index * first[0].stride(1) * first[0].itemsize if first else 0
            tables.append(None if table is None else table + offset)
        return CacheView(blocks, tables[0], self.slots_B, self.starts_B, None, scales, tables[1])


def shape_for(model: Any, batch: int, tokens: int = 0, dtype: torch.dtype | None = None) -> CacheShape:
    """Returns the shape of the cache of `batch` sequences, each of up to `tokens`, of a causal LM with hasten's overlays. dtype: None =
    that of the keys."""
    attentions = [module for module in model.modules() if isinstance(module, AttentionOverlay)]
    weight: Any = model.get_input_embeddings().weight
    first = attentions[0]
    usual = model.overlay_config.max_seq_length or model.config.get_text_config().max_position_embeddings
    places: dict[int, Any] = {attention.layer_idx: next(attention.parameters()).device for attention in attentions}
    return CacheShape(
        layers=max(places) + 1,
        batch=batch,
        heads=first.k_proj.out_features // first.head_dim,
        channels=first.head_dim,
        capacity=max(usual, tokens),
        dtype=compute_dtype(weight) if dtype is None else dtype,
        device=weight.device,
        devices=tuple(places.get(layer, weight.device) for layer in range(max(places) + 1)),
    )
