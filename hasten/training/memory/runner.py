"""Runs each decoder layer by its ActivationAction: saves, recomputes or offloads its activations, with its MLP in
tiles.

transformers calls `layer._gradient_checkpointing_func(function, hidden)` in training. An installed `LayerCheckpoint`
takes that call, and stays installed even if a trainer sets another function, so neither transformers nor torch is
patched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hasten.overlays.layer import LayerCheckpoint
from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.offload import HostMemory, OffloadedLayer
from hasten.training.memory.oom import OomAdvisor
from hasten.training.memory.planner import Planner

CHECKPOINTED = (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD)
"""Actions that recompute the whole layer (torch.utils.checkpoint)."""
OFFLOADED = (ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST, ActivationAction.OFFLOAD)
"""Actions that offload what autograd saves."""


class LayerRunner:
    """Runs the layers of one model. host: pinned CPU memory, per device. outgoing: per device, the last offloaded
    layer, whose copies to the CPU may still run. previous: per device, the last offloaded layer of the running
    forward."""

    def __init__(self, planner: Planner, advisor: OomAdvisor) -> None:
        self.planner = planner
        self.advisor = advisor
        self.host: dict[torch.device, HostMemory] = {}
        self.outgoing: dict[torch.device, OffloadedLayer] = {}
        self.previous: dict[torch.device, weakref.ref[OffloadedLayer]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Drops the state of a running step from copies."""
        return {**self.__dict__, "host": {}, "outgoing": {}, "previous": {}}

    def install(self) -> int:
        """Installs a LayerCheckpoint on every layer overlay. Returns how many there are."""
        for index, layer in enumerate(self.planner.layers):
            layer._gradient_checkpointing_func = LayerCheckpoint(self.run, index)
        return len(self.planner.layers)

    def uninstall(self) -> None:
        for layer in self.planner.layers:
            del layer._gradient_checkpointing_func

    @property
    def pinned(self) -> int:
        """Bytes of CPU memory allocated for offloading."""
        return sum(memory.allocated for memory in self.host.values())

    def run(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """Runs the forward of layer `index`; in a graph that is traced, recomputes it in the backward. function: the layer with its keyword arguments bound. args[0]: hidden
        states (B, T, E)."""
        hidden = args[0]
        if not torch.is_grad_enabled():
            return function(*args)
        if torch.compiler.is_compiling():  # plans and offloading are no operations of a graph
            return checkpoint(function, *args, use_reentrant=False)
        planner = self.planner
        if index == 0 or planner.latest is None:
            self._release(hidden.device)
            self.previous.pop(hidden.device, None)
            planner.latest = planner.plan(hidden.shape[0], hidden.shape[1], self.pinned)
        action, tile = planner.latest.actions[index], planner.latest.tile
        if action is ActivationAction.SAVE_ALL and planner.tile is None:
            tile = None
        run = functools.partial(self._run_layer, tile, function)
        if action in CHECKPOINTED:
            run = functools.partial(checkpoint, run, use_reentrant=False)
        offloaded = self._offloaded_layer(hidden, function) if action in OFFLOADED else None
        with contextlib.nullcontext() if offloaded is None else offloaded.hooks():
            out = run(*args)
        self._release(hidden.device)
        if offloaded is not None:
            self.outgoing[hidden.device] = offloaded
            self.previous[hidden.device] = weakref.ref(offloaded)
        if index == len(planner.layers) - 1:
            self.advisor.watch_backward(out)  # the model's head has no overlay
        return out

    def _run_layer(self, tile: int | None, function: Callable[..., Any], *args: Any) -> Any:
        """Returns the layer with its MLP in tiles. The tile is bound now: the recomputation must not use that of a
        later plan."""
        with self.advisor.advising(self.advisor.batch_shape):
            return function(*args, mlp_tile=tile)

    def _release(self, device: torch.device) -> None:
        offloaded = self.outgoing.pop(device, None)
        if offloaded is not None:
            offloaded.release()

    def _offloaded_layer(self, hidden: torch.Tensor, function: Any) -> OffloadedLayer:
        memory = self.host.get(hidden.device)
        if memory is None:
            memory = self.host[hidden.device] = HostMemory(hidden.device)
        # Keyword arguments (masks, rotary embeddings) are the same tensors for every layer.
        shared = frozenset(t.untyped_storage().data_ptr() for t in _tensors(getattr(function, "keywords", {})))
        batch_shape = (hidden.shape[0], hidden.shape[1])
        return OffloadedLayer(memory, batch_shape, shared, self.previous.get(hidden.device))


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(tree):  # an AttentionContext
        for one in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, one.name))
