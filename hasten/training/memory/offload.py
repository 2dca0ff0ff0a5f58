"""Offloads saved activations to pinned CPU memory between a layer's forward and its backward.

Copies to the CPU run on a side stream while the layer still computes; copies back run on another, one layer ahead of
the backward. The CPU never waits: before device memory is reused, the main stream waits for the copy, so the peak does
not depend on how far the CPU runs ahead of the GPU. (torch's `save_on_cpu` waits for every copy; the tests compare with
it.)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class OffloadSizes:
    """In bytes. chunk: CPU memory allocated at a time, a power of two, to which torch's pinned allocator rounds anyway.
    smallest: storages below this size stay on the device."""

    chunk: int = 32 * 2**20
    smallest: int = 2**20


DEFAULT_SIZES = OffloadSizes()
_SIZES: ContextVar[OffloadSizes] = ContextVar("offload_sizes", default=DEFAULT_SIZES)


@contextmanager
def offload_sizes(sizes: OffloadSizes) -> Iterator[None]:
    """Sets the sizes for models whose first offloading step is inside the block, for tests with tiny models."""
    token = _SIZES.set(sizes)
    try:
        yield
    finally:
        _SIZES.reset(token)


@dataclass
class HostChunk:
    """CPU memory. last_copy: recorded after the last copy that read or wrote it."""

    bytes: torch.Tensor
    last_copy: torch.cuda.Event | None = None


class HostMemory:
    """Chunks of CPU memory for one device, reused in later steps; pinned if the device is a GPU. free: not in use.
    allocated: bytes of all chunks. to_host, to_device: the streams of the copies, None on a CPU. sizes: see
    `offload_sizes`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sizes = _SIZES.get()
        self.free: list[HostChunk] = []
        self.allocated = 0
        on_gpu = device.type == "cuda"
        self.to_host = torch.cuda.Stream(device) if on_gpu else None
        self.to_device = torch.cuda.Stream(device) if on_gpu else None

    def take(self, size: int) -> list[HostChunk]:
        """Returns chunks for `size` bytes, allocating those that are missing."""
        chunk = self.sizes.chunk
        count = -(-size // chunk)
        while len(self.free) < count:  # before any chunk is taken, so that none is lost if the allocation fails
            self.free.append(HostChunk(torch.empty(chunk, dtype=torch.uint8, pin_memory=self.to_host is not None)))
            self.allocated += chunk
        return [self.free.pop() for _ in range(count)]

    def send(self, source: torch.Tensor, chunks: list[HostChunk]) -> torch.cuda.Event | None:
        """Copies device bytes (1-D uint8) into chunks, after all work queued on the main stream so far.

        Returns an event recorded after the copy; None on a CPU, where the copy is complete.
        """
        return self._copy(self.to_host, source, chunks, back=False)

    def fetch(self, chunks: list[HostChunk], into: torch.Tensor) -> torch.cuda.Event | None:
        """Copies chunks back into `into` (1-D uint8), whose memory the main stream may have used until now. Returns as
        `send`."""
        return self._copy(self.to_device, into, chunks, back=True)

    def _copy(
        self, stream: torch.cuda.Stream | None, device_bytes: torch.Tensor, chunks: list[HostChunk], back: bool
    ) -> torch.cuda.Event | None:
        """Runs after the main stream's queue and after the last copy of each chunk."""
        if stream is None:
            _copy_chunks(device_bytes.split(self.sizes.chunk), chunks, back)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for chunk in chunks:
            if chunk.last_copy is not None:
                stream.wait_event(chunk.last_copy)
        with torch.cuda.stream(stream):
            _copy_chunks(device_bytes.split(self.sizes.chunk), chunks, back)
        return _record(stream, chunks)

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Makes the main stream wait for `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def outlive(self, tensor: torch.Tensor | None) -> None:
        """Keeps the allocator from reusing the memory of `tensor` before the side streams have finished what is queued
        on them."""
        for stream in (self.to_host, self.to_device):
            if tensor is not None and stream is not None:
                tensor.record_stream(stream)


def _copy_chunks(parts: Iterable[torch.Tensor], chunks: Iterable[HostChunk], back: bool) -> None:
    for part, chunk in zip(parts, chunks, strict=True):
        on_host = chunk.bytes[: len(part)]
        into, source = (part, on_host) if back else (on_host, part)
        into.copy_(source, non_blocking=True)


def _record(stream: torch.cuda.Stream, chunks: Iterable[HostChunk]) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    for chunk in chunks:
        chunk.last_copy = event
    return event


@dataclass
class OffloadedStorage:
    """One storage. sent: recorded after the copy to the CPU. outgoing: its device memory, until `release`. fetched: its
    device memory after the copy back, which `ready` is recorded after. uses: saved tensors that still refer to it."""

    size: int
    chunks: list[HostChunk]
    sent: torch.cuda.Event | None
    outgoing: torch.Tensor | None
    fetched: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None
    uses: int = 0


@dataclass(frozen=True)
class SavedHandle:
    """What autograd saves in place of an offloaded tensor."""

    layer: OffloadedLayer
    stored: OffloadedStorage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class OffloadedLayer:
    """The offloaded activations of one layer.

    Views of one storage (q, k and v) are copied once and keep their strides. batch_shape: sequences and tokens per
    sequence. shared: data pointers of storages that all layers read; they stay on the device. previous: the offloaded
    layer before this one, fetched ahead of its backward. storages: by data pointer until `release`.
    """

    memory: HostMemory
    batch_shape: tuple[int, int]
    shared: frozenset[int]
    previous: weakref.ref[OffloadedLayer] | None = None
    storages: dict[int, OffloadedStorage] = field(default_factory=dict)

    def hooks(self) -> Any:
        """Returns the context in which autograd saves through this object."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _offloads(self, tensor: torch.Tensor) -> bool:
        """Returns whether the tensor holds values per token, belongs to this layer alone and is large enough."""
        if tensor.device != self.memory.device or tensor.layout != torch.strided or tensor.dim() < 2:
            return False
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.memory.sizes.smallest or storage.data_ptr() in self.shared or _is_weight(tensor):
            return False
        batch, length = self.batch_shape
        return tensor.shape[0] == batch * length or (tensor.shape[0] == batch and length in tensor.shape[1:])

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedHandle:
        if not self._offloads(tensor):
            return tensor
        storage = tensor.untyped_storage()
        stored = self.storages.get(storage.data_ptr())
        if stored is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # pyright: ignore[reportArgumentType]
            chunks = self.memory.take(storage.nbytes())
            stored = OffloadedStorage(storage.nbytes(), chunks, self.memory.send(whole, chunks), whole)
            self.storages[storage.data_ptr()] = stored
        stored.uses += 1
        return SavedHandle(self, stored, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def release(self) -> None:
        """Frees the device memory: the main stream waits for the copies to the CPU. Called after the next layer's
        forward."""
        for stored in self.storages.values():
            if stored.outgoing is not None:
                self.memory.wait(stored.sent)
                stored.outgoing = None
        self.storages = dict(enumerate(self.storages.values()))  # data pointers may be reused from here on

    def fetch(self) -> None:
        """Starts the copies back to the device of all storages that are not on the device."""
        for stored in self.storages.values():
            if stored.fetched is None and stored.uses:
                if stored.outgoing is not None:  # of the last layer, never released; its copy may still read it
                    stored.fetched, stored.outgoing, stored.ready = stored.outgoing, None, stored.sent
                    continue
                stored.fetched = torch.empty(stored.size, dtype=torch.uint8, device=self.memory.device)
                stored.ready = self.memory.fetch(stored.chunks, stored.fetched)

    @staticmethod
    def _unpack(saved: torch.Tensor | SavedHandle) -> torch.Tensor:
        if not isinstance(saved, SavedHandle):
            return saved
        layer, stored = saved.layer, saved.stored
        if stored.fetched is None:
            stored.uses = max(stored.uses, 1)
            layer.fetch()
        previous = layer.previous() if layer.previous is not None else None
        if previous is not None:
            previous.fetch()
        layer.memory.wait(stored.ready)
        stored.ready = None
        assert stored.fetched is not None
        storage = stored.fetched.untyped_storage()
        tensor = torch.empty(0, dtype=saved.dtype, device=layer.memory.device)
        tensor = tensor.set_(storage, saved.offset, saved.shape, saved.stride)  # pyright: ignore[reportArgumentType, reportCallIssue]
        stored.uses -= 1
        if stored.uses <= 0:
            stored.fetched = None  # autograd owns it now; a second backward fetches it again
        return tensor

    def __del__(self) -> None:
        """Returns the CPU memory to the pool. Device memory must not be reused while an unfinished copy uses it. Since
        this may run in any stream or thread, or in garbage collection, the allocator does the waiting (`outlive`)."""
        if sys.is_finalizing():
            return
        for stored in self.storages.values():
            self.memory.outlive(stored.outgoing)
            if stored.ready is not None:
                self.memory.outlive(stored.fetched)
            self.memory.free += stored.chunks


def _is_weight(tensor: torch.Tensor) -> bool:
    """Returns whether the memory is a parameter's; saved-tensor hooks see a parameter as a view of itself."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
