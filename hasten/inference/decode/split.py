"""The step of a model whose layers are on several devices: a CUDA graph per part, and copies between devices in front of each.

The forward runs once while it is captured. Before a module that is on another device, the graph of the part before it ends, and
the tensors that the module is given get copies on its device, at addresses that stay. accelerate's hooks then find nothing
to move. A step replays the parts in order, each after copying its inputs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from hasten.inference.decode.step import CAPTURES, WARM_UPS, DecodeStep


class Graph(Protocol):
    """Operations of one device that are recorded between `begin` and `end`."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph of one device, captured on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self._scope = ExitStack()

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)
        self._scope.enter_context(torch.cuda.device(self._device))
        self._scope.enter_context(torch.cuda.stream(torch.cuda.Stream(self._device)))
        self._graph.capture_begin(capture_error_mode="thread_local")

    def end(self) -> None:
        with self._scope:
            self._graph.capture_end()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


class Cuda:
    """What a recorder needs of the devices; a test has its own."""

    def device_of(self, x: torch.Tensor) -> torch.device:
        return x.device

    def empty_like(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return torch.empty_like(x, device=device)

    def graph(self, device: torch.device) -> Graph:
        return CudaGraph(device)


@dataclass
class Part:
    """inputs: (tensor of an earlier part, its copy on `device`). Copies stay valid for later parts of the same device."""

    device: torch.device
    graph: Graph
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def replay(self) -> None:
        for source, copy in self.inputs:
            copy.copy_(source, non_blocking=True)
        self.graph.replay()


class Recorder:
    """Records a forward in parts. devices: module -> its device, for modules that are called one after another."""

    def __init__(self, devices: dict[nn.Module, torch.device], backend: Any) -> None:
        self._devices, self._backend = devices, backend
        self.parts: list[Part] = []
        self._copies: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._is_recording = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sees calls of the modules inside the block. Whatever steps aside for a hook does so in warm-ups too."""
        handles = [module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in self._devices]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def recording(self, device: torch.device) -> Iterator[None]:
        """Records what runs inside the block; its first part is on `device`."""
        self._begin(Part(device, self._backend.graph(device)))
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False
            self.parts[-1].graph.end()

    def _begin(self, part: Part) -> None:
        self.parts.append(part)
        part.graph.begin()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not self._is_recording:
            return None
        device, part, given = self._devices[module], self.parts[-1], list[torch.Tensor]()
        _map((args, kwargs), lambda x: given.append(x) or x)
        new = [x for x in given if self._backend.device_of(x) != device and (device, id(x)) not in self._copies]
        if device != part.device or new:
            part.graph.end()
            part = Part(device, self._backend.graph(device))
            for x in new:
                copy = self._copies[device, id(x)] = self._backend.empty_like(x, device)
                part.inputs.append((x, copy))
            self._begin(part)
        return _map((args, kwargs), lambda x: self._copies.get((device, id(x)), x))


class SplitGraph:
    """Replays the parts, then the end of the step, which reads the logits."""

    def __init__(self, parts: list[Part], end: Any) -> None:
        self._parts, self._end = parts, end

    def replay(self) -> None:
        for part in self._parts:
            part.replay()
        self._end()


class SplitStep(DecodeStep):
    """The step of a model on several devices."""

    backend: Any = Cuda()

    def _logits(self, model: Any) -> torch.Tensor:
        # accelerate's hook of the whole model would copy the logits to the first device, at the end of the last graph.
        return super()._logits(vars(model).get("_old_forward", model))

    def _capture(self) -> None:
        model: Any = self._model()
        recorder = Recorder(devices_of(model), self.backend)
        with recorder.watching():
            for _ in range(WARM_UPS):
                with self._restored():
                    self._forward()
            with CAPTURES, recorder.recording(self._cache.shape.device):
                self.logits_BV = self._logits(model)
        self._graph = SplitGraph(recorder.parts, lambda: self._advance(self.logits_BV))


def devices_of(model: Any) -> dict[nn.Module, torch.device]:
    """Returns the device of each module that the backbone and the head call one after another. A module without weights is on that
    of the module before it."""
    found: dict[nn.Module, torch.device] = {}
    device = model.get_input_embeddings().weight.device
    for module in (*model.model.children(), model.lm_head):
        for part in module if isinstance(module, nn.ModuleList) else (module,):
            device = next((x.device for x in (*part.parameters(), *part.buffers())), device)
            found[part] = device
    return found


def _map(x: Any, change: Any) -> Any:
    """Applies `change` to every tensor inside tuples, lists and dictionaries."""
    if isinstance(x, torch.Tensor):
        return change(x)
    if isinstance(x, tuple | list):
        return type(x)(_map(one, change) for one in x)
    if isinstance(x, dict):
        return {key: _map(one, change) for key, one in x.items()}
    return x
