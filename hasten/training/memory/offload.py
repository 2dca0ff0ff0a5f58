"""Tensors that wait in host memory between a layer's forward and its backward.

Each layer's tensors make a layer. They leave on one side stream while the layer still runs, and come back on another one layer
ahead of their backward. Nothing waits on the host: where device memory is about to be reused, the main stream waits for the copy,
so the peak does not depend on how far the host runs ahead. (torch's `save_on_cpu` waits for every copy, and is the tests' oracle.)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CHUNK = 32 * 2**20
"""Bytes of host memory taken at a time: a power of two, to which torch's pinned allocator rounds anyway."""
SMALLEST = 2**20
"""Bytes below which a tensor stays where it is."""


@dataclass
class HostChunk:
    """Host memory, and the last copy that read or wrote it."""

    bytes: torch.Tensor
    used: torch.cuda.Event | None = None


class HostMemory:
    """Chunks of host memory of one device's model, reused from step to step; pinned where the device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[HostChunk] = []
        self.taken = 0
        on_gpu = device.type == "cuda"
        self.out = torch.cuda.Stream(device) if on_gpu else None
        self.back = torch.cuda.Stream(device) if on_gpu else None

    def take(self, size: int) -> list[HostChunk]:
        """Chunks for `size` bytes."""
        count = -(-size // CHUNK)
        while len(self.free) < count:  # before any is taken, so that none is lost where the host has no more
            self.free.append(HostChunk(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.out is not None)))
            self.taken += CHUNK
        return [self.free.pop() for _ in range(count)]

    def send(self, source: torch.Tensor, chunks: list[HostChunk]) -> torch.cuda.Event | None:
        """Copies the bytes (1-D uint8, on the device) into chunks, after what the main stream was given so far."""
        return self._move(self.out, source, chunks, back=False)

    def fetch(self, chunks: list[HostChunk], into: torch.Tensor) -> torch.cuda.Event | None:
        """Copies chunks back into `into` (1-D uint8), whose memory the main stream may have used until now."""
        return self._move(self.back, into, chunks, back=True)

    def _move(
        self, stream: torch.cuda.Stream | None, device_bytes: torch.Tensor, chunks: list[HostChunk], back: bool
    ) -> torch.cuda.Event | None:
        """After the main stream and after whatever last used the chunks. Returns when it is done; None: it is (on a CPU)."""
        if stream is None:
            _copy(device_bytes, chunks, back)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for chunk in chunks:
            if chunk.used is not None:
                stream.wait_event(chunk.used)
        with torch.cuda.stream(stream):
            _copy(device_bytes, chunks, back)
        return _mark(stream, chunks)

    def wait(self, event: torch.cuda.Event | None) -> None:
        """What the main stream is given from here on comes after `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def outlive(self, tensor: torch.Tensor | None) -> None:
        """The device memory of `tensor` is not reused before the side streams have done what they were given so far."""
        for stream in (self.out, self.back):
            if tensor is not None and stream is not None:
                tensor.record_stream(stream)


def _copy(device_bytes: torch.Tensor, chunks: Iterable[HostChunk], back: bool) -> None:
    for part, chunk in zip(device_bytes.split(CHUNK), chunks, strict=True):
        here = chunk.bytes[: len(part)]
        into, source = (part, here) if back else (here, part)
        into.copy_(source, non_blocking=True)


def _mark(stream: torch.cuda.Stream, chunks: Iterable[HostChunk]) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    for chunk in chunks:
        chunk.used = event
    return event


@dataclass
class OffloadedStorage:
    """One storage: its bytes on the host, and on the device while they leave or after they came back."""

    size: int
    chunks: list[HostChunk]
    sent: torch.cuda.Event | None
    leaving: torch.Tensor | None
    here: torch.Tensor | None = None
    ready: torch.cuda.Event | None = None
    wanted: int = 0


@dataclass(frozen=True)
class SavedHandle:
    """What autograd holds in place of a tensor."""

    layer: OffloadedLayer
    stored: OffloadedStorage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class OffloadedLayer:
    """What one layer keeps in host memory. `before`: the layer of the hosted layer before it, fetched ahead of its backward.

    Views of one storage (q, k and v) travel together and keep their strides. shared: storages that many layers read, which stay.
    """

    memory: HostMemory
    rows: tuple[int, int]
    shared: frozenset[int]
    before: weakref.ref[OffloadedLayer] | None = None
    storages: dict[int, OffloadedStorage] = field(default_factory=dict)

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _takes(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor has a row a token, is the layer's own and worth a copy."""
        if tensor.device != self.memory.device or tensor.layout != torch.strided or tensor.dim() < 2:
            return False
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST or storage.data_ptr() in self.shared or _is_weight(tensor):
            return False
        batch, length = self.rows
        return tensor.shape[0] == batch * length or (tensor.shape[0] == batch and length in tensor.shape[1:])

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | SavedHandle:
        if not self._takes(tensor):
            return tensor
        storage = tensor.untyped_storage()
        stored = self.storages.get(storage.data_ptr())
        if stored is None:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # pyright: ignore[reportArgumentType]
            chunks = self.memory.take(storage.nbytes())
            stored = OffloadedStorage(storage.nbytes(), chunks, self.memory.send(whole, chunks), whole)
            self.storages[storage.data_ptr()] = stored
        stored.wanted += 1
        return SavedHandle(self, stored, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def release(self) -> None:
        """Gives up the device's copies: the main stream waits until they have left. Called when the next layer has run."""
        for stored in self.storages.values():
            if stored.leaving is not None:
                self.memory.wait(stored.sent)
                stored.leaving = None
        self.storages = dict(enumerate(self.storages.values()))  # addresses mean nothing now

    def fetch(self) -> None:
        """Starts the way back of all that is not here."""
        for stored in self.storages.values():
            if stored.here is None and stored.wanted:
                if stored.leaving is not None:  # the last layer's, which never had to go; its copy may still be read
                    stored.here, stored.leaving, stored.ready = stored.leaving, None, stored.sent
                    continue
                stored.here = torch.empty(stored.size, dtype=torch.uint8, device=self.memory.device)
                stored.ready = self.memory.fetch(stored.chunks, stored.here)

    @staticmethod
    def _unpack(held: torch.Tensor | SavedHandle) -> torch.Tensor:
        if not isinstance(held, SavedHandle):
            return held
        layer, stored = held.layer, held.stored
        if stored.here is None:
            stored.wanted = max(stored.wanted, 1)
            layer.fetch()
        before = layer.before() if layer.before is not None else None
        if before is not None:
            before.fetch()
        layer.memory.wait(stored.ready)
        stored.ready = None
        assert stored.here is not None
        storage = stored.here.untyped_storage()
        tensor = torch.empty(0, dtype=held.dtype, device=layer.memory.device)
        tensor = tensor.set_(storage, held.offset, held.shape, held.stride)  # pyright: ignore[reportArgumentType, reportCallIssue]
        stored.wanted -= 1
        if stored.wanted <= 0:
            stored.here = None  # autograd has it now; a second backward fetches it again
        return tensor

    def __del__(self) -> None:
        """Gives the host memory back. A copy that nobody waited for must not outlive the device's; which stream, thread or
        garbage collection this runs in is unknown, so it is the allocator that waits."""
        if sys.is_finalizing():
            return
        for stored in self.storages.values():
            self.memory.outlive(stored.leaving)
            if stored.ready is not None:
                self.memory.outlive(stored.here)
            self.memory.free += stored.chunks


def _is_weight(tensor: torch.Tensor) -> bool:
    """Whether a parameter's memory is meant; hooks see a parameter as a view of itself."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
