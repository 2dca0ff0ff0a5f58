"""One decoding step as a CUDA graph: forward of one token per sequence, greedy choice, and the cache's counters."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from hasten.inference.decode.cache import KVCache
from hasten.inference.decode.context import CachedAttention

WARM_UPS = 2
"""Steps before the capture: Triton compiles its kernels and cuBLAS takes its workspace."""

CAPTURES = threading.Lock()
"""Held while a step is captured: torch empties its memory cache before a capture, which it must not do during another one."""


class Replayable(Protocol):
    """A captured step: a CUDA graph, or one per part of a model that is on several devices."""

    def replay(self) -> None: ...


class DecodeStep:
    """token_B1, position_B1: (B, 1) int64, read by the next step; a step leaves the greedy choice and the next position there.
    logits_BV: (B, V) fp32, of the last step. On a CPU steps run eagerly."""

    def __init__(self, model: Any, cache: KVCache, pool: Any = None) -> None:
        """pool: the memory pool of the graph (`torch.cuda.graph_pool_handle`), None = its own."""
        shape = cache.shape
        self._model = weakref.ref(model)  # the model holds its engine, and so this step
        self._cache, self._pool = cache, pool
        self._context = CachedAttention(cache, prompt=False)
        self._graph: Replayable | None = None
        self.token_B1, self.position_B1 = (
            torch.zeros(shape.batch, 1, dtype=torch.int64, device=shape.device) for _ in range(2)
        )
        self.logits_BV = torch.empty(0)

    def run(self) -> None:
        """Runs one step. The cache must have been reserved for one more token."""
        if self._graph is not None:
            self._graph.replay()
        elif self._cache.shape.device.type == "cuda":
            with _fresh_casts():
                self._capture()
            self.run()
        else:
            self.logits_BV = self._forward()

    def _forward(self) -> torch.Tensor:
        logits = self._logits(self._model())
        self._advance(logits)
        return logits

    def _logits(self, model: Any) -> torch.Tensor:
        outputs = model(
            input_ids=self.token_B1, position_ids=self.position_B1, attention_context=self._context, use_cache=False
        )
        return outputs.logits[:, -1].float()

    def _advance(self, logits: torch.Tensor) -> None:
        self.token_B1.copy_(logits.argmax(-1, keepdim=True))
        self._cache.advance(1)
        self.position_B1 += 1

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Puts the state back after the block: a step that wrote a slot is written over by the next."""
        state = (self.token_B1, self.position_B1, *self._cache.counters)
        before = [tensor.clone() for tensor in state]
        yield
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def _capture(self) -> None:
        device = self._cache.shape.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                with self._restored():
                    self._forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a trainer's data loader, another model) may allocate meanwhile. torch's own capture stream is one for the
        # process and its first device.
        with CAPTURES, torch.cuda.graph(graph, self._pool, stream, "thread_local"):
            self.logits_BV = self._forward()
        self._graph = graph


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Keeps autocast from reusing casts of weights, which do not outlive the autocast block but would be in the graph."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
