"""The one object that decides what each layer of a model stores, recomputes or sends to host memory, and does it.

transformers calls `layer._gradient_checkpointing_func(function, hidden)` in training; a layer that wears a `LayerCheckpoint` hands out that in
place of whatever a trainer has set there, so nothing of transformers or torch is patched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch.utils.checkpoint import checkpoint

from hasten.errors import CheckpointError
from hasten.overlays import LayerOverlay, MLPOverlay
from hasten.overlays.layer import LayerCheckpoint
from hasten.state import find_state
from hasten.training.memory import bandwidth, oom
from hasten.training.memory.actions import UNIFORM_ACTIONS, ActivationAction
from hasten.training.memory.advice import Settings, advice, savings
from hasten.training.memory.costs import ModelShape, Peak, with_tile
from hasten.training.memory.offload import HostMemory, OffloadedLayer
from hasten.training.memory.plan import LayerPlan, plan_layers, uniform
from hasten.training.memory.plan_key import PlanKey, coarse, compute_dtype, processes_here
from hasten.units import format_bytes

logger = logging.getLogger(__name__)

MARGIN = 0.01
"""Of a budget, what a plan leaves alone: how far predictions may be off."""
ALLOCATOR = 0.05
"""Of all memory, what is left to the allocator's fragments where no budget was given."""
MAX_PINNED_FRACTION = 0.6
"""Of the host memory that is free, what the processes of this machine may pin together."""
UNKNOWN = Peak("unknown", 0, 0, 0, 0, 0)
MAX_EXACT_PLANS = 16
"""So many plans are made for the very shapes that come; where shapes go on changing, lengths are rounded up to `coarse` ones."""
PLAN_CACHE_SIZE = 256
"""Plans that are remembered."""


@dataclass
class MemoryPolicy:
    """mode: False (then only for its advice), True, "offload" or "auto". budget: bytes on the device that the whole process may
    take, None = what is free when a plan is made. tile: rows at a time of MLPs that the user asked to be tiled, None = the plan
    chooses. rows: of the last batch, and their length. inside: how many of its own calls run now. leaving: on each device, what the layer before sent off. before: on each,
    the last offloaded of the forward that runs."""

    model: Any
    mode: bool | str
    budget: int | None = None
    tile: int | None = None
    layers: list[LayerOverlay] = field(init=False)
    plans: dict[tuple[int, int, PlanKey], LayerPlan] = field(default_factory=dict)
    latest: LayerPlan | None = None
    others: int | None = None
    rows: tuple[int, int] | None = None
    inside: int = 0
    host: dict[torch.device, HostMemory] = field(default_factory=dict)
    leaving: dict[torch.device, OffloadedLayer] = field(default_factory=dict)
    before: dict[torch.device, weakref.ref[OffloadedLayer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = [module for module in self.model.modules() if isinstance(module, LayerOverlay)]

    def install(self) -> int:
        """Puts a seat on every layer under an overlay. Returns how many there are."""
        for index, layer in enumerate(self.layers):
            layer._gradient_checkpointing_func = LayerCheckpoint(self.run, index)
        return len(self.layers)

    def uninstall(self) -> None:
        for layer in self.layers:
            del layer._gradient_checkpointing_func

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without anything that belongs to a running step or to one process."""
        return {
            **self.__dict__,
            "plans": {},
            "latest": None,
            "others": None,
            "inside": 0,
            "host": {},
            "leaving": {},
            "before": {},
        }

    # A step

    def run(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """One layer's forward. args[0]: the hidden states (B, T, E)."""
        hidden = args[0]
        if not torch.is_grad_enabled():
            return function(*args)
        if index == 0 or self.latest is None:
            self._leave(hidden.device)
            self.before.pop(hidden.device, None)
            self.latest = self.plan(hidden.shape[0], hidden.shape[1])
        action, tile = self.latest.actions[index], self.latest.tile
        if action is ActivationAction.SAVE_ALL and self.tile is None:
            tile = None
        run = functools.partial(self._with_tile, tile, function)
        if action in (ActivationAction.RECOMPUTE, ActivationAction.OFFLOAD):
            run = functools.partial(checkpoint, run, use_reentrant=False)
        waits = action in (ActivationAction.RECOMPUTE_MLP_OFFLOAD_REST, ActivationAction.OFFLOAD)
        offloaded = self._offloaded_layer(hidden, function) if waits else None
        with contextlib.nullcontext() if offloaded is None else offloaded.hooks():
            out = run(*args)
        self._leave(hidden.device)
        if offloaded is not None:
            self.leaving[hidden.device] = offloaded
            self.before[hidden.device] = weakref.ref(offloaded)
        return out

    def _leave(self, device: torch.device) -> None:
        offloaded = self.leaving.pop(device, None)
        if offloaded is not None:
            offloaded.release()

    def _with_tile(self, tile: int | None, function: Callable[..., Any], *args: Any) -> Any:
        """The layer with its MLP in tiles; also when it is recomputed, whatever the plan says by then."""
        with self.advising(self.rows):
            return function(*args, mlp_tile=tile)

    def _offloaded_layer(self, hidden: torch.Tensor, function: Any) -> OffloadedLayer:
        memory = self.host.get(hidden.device)
        if memory is None:
            memory = self.host[hidden.device] = HostMemory(hidden.device)
        shared = frozenset(t.untyped_storage().data_ptr() for t in _tensors(getattr(function, "keywords", {})))
        return OffloadedLayer(memory, (hidden.shape[0], hidden.shape[1]), shared, self.before.get(hidden.device))

    # The plan

    def plan(self, batch: int, length: int) -> LayerPlan:
        """The plan for rows of this shape, made once for each, or for shapes that are nearly alike where there are many."""
        now = PlanKey.of(self.layers)
        if (batch, length, now) not in self.plans and len(self.plans) >= MAX_EXACT_PLANS:
            length = coarse(length)
        found = self.plans.get((batch, length, now))
        if found is None:
            found = self.plans[batch, length, now] = self._new_plan(batch, length)
            if len(self.plans) > PLAN_CACHE_SIZE:
                del self.plans[next(iter(self.plans))]
            if not found.fits:
                logger.warning(
                    "no plan for %d x %d tokens stays within the memory budget; the leanest takes %s",
                    batch,
                    length,
                    format_bytes(found.peak.total),
                )
        return found

    def _new_plan(self, batch: int, length: int) -> LayerPlan:
        device, devices = next(self.layers[0].parameters()).device, self.devices()
        action = UNIFORM_ACTIONS.get(self.mode, ActivationAction.OFFLOAD if len(devices) > 1 else None)
        shape = self._shape()
        if shape is None:
            return LayerPlan((action or ActivationAction.OFFLOAD,) * len(self.layers), self.tile, UNKNOWN)
        if self.others is None:
            stream = batch * length * shape.hidden * shape.itemsize  # which is there by now, and in the plan
            self.others = max(0, self._others(shape, device) - stream)
        if action is not None:
            return uniform(shape, batch, length, action, self.tile)
        budget = int(self._all_memory(device) * (1 - MARGIN)) - self.others
        tiled = all(isinstance(layer.mlp, MLPOverlay) and not _drops(layer.mlp) for layer in self.layers)
        tiles = (None,) if not tiled else () if self.tile is None else (self.tile,)
        room = int(psutil.virtual_memory().available * MAX_PINNED_FRACTION / processes_here())
        room += sum(one.taken for one in self.host.values())
        accumulates = PlanKey.of(self.layers).accumulates
        return plan_layers(shape, batch, length, budget, bandwidth.measure(device), tiles, room, accumulates)

    def devices(self) -> set[torch.device]:
        """Where the layers are. Over several devices no plan is made, and every layer is treated as leanly as can be."""
        return {next(layer.parameters()).device for layer in self.layers}

    def _shape(self) -> ModelShape | None:
        """None for a model that the formulas do not know: an MLP of the user's own, say."""
        try:
            return ModelShape.of_model(self.model, compute_dtype(next(self.layers[0].parameters()).device))
        except CheckpointError as error:
            if self.mode == "auto" and not self.plans:
                logger.warning("no plan can be made: %s", error)
            return None

    def _all_memory(self, device: torch.device) -> int:
        """Bytes that this process may take of the device."""
        if self.budget is not None:
            return self.budget
        if device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - int(ALLOCATOR * whole)
        return psutil.virtual_memory().available + sum(t.nbytes for t in self.model.parameters())

    def _others(self, shape: ModelShape, device: torch.device) -> int:
        """Bytes of what the process holds beside the model before its first step: batches, other models."""
        if device.type != "cuda":
            return 0
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        return max(0, torch.cuda.memory_allocated(device) - shape.weights - gradients)

    # What would make room

    @contextlib.contextmanager
    def advising(self, rows: tuple[int, int] | None) -> Iterator[None]:
        """For a forward over rows of this shape, or a part of it: an out-of-memory error says which changes would make room."""
        self.rows = rows
        oom.watch(self)
        self.inside += 1
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not getattr(error, "__notes__", ()) and (text := self.advice()):
                error.add_note(text)
            raise
        finally:
            self.inside -= 1

    def advice(self) -> str | None:
        """What the latest step was and which changes would make room, each with its GiB; None where nobody can tell.

        Makes no new plan: measuring the link would ask for memory that is not there.
        """
        shape = self._shape() if self.rows is not None and self.layers else None
        if self.rows is None or shape is None:
            return None
        batch, length = self.rows
        plan = self.latest or uniform(
            shape, batch, length, UNIFORM_ACTIONS.get(self.mode, ActivationAction.OFFLOAD), self.tile
        )
        settings = Settings(batch, length, with_tile(plan.actions, self.tile), plan.tile)
        said = f"This step had {batch} rows of {length} tokens; {format_bytes(settings.peak(shape))} were predicted at its peak ({plan})."
        return f"{said}\n{advice(savings(shape, settings))}"

    def __str__(self) -> str:
        if not self.mode:
            return "every layer keeps what is dear to make again"
        if self.latest is None:
            return "planned at the first step"
        plan = self.latest
        if plan.peak is UNKNOWN:
            return str(plan)
        return f"{plan} (predicted peak {format_bytes(plan.peak.total)}, at the {plan.peak.when})"


def policy_of(model: Any) -> MemoryPolicy | None:
    """The memory policy of a causal LM, or of the one under its PeftModel."""
    state = find_state(model)
    return state.memory if state is not None and isinstance(state.memory, MemoryPolicy) else None


def _drops(module: torch.nn.Module) -> bool:
    """Whether dropout is active below: tiles would draw other numbers than whole rows."""
    return any(isinstance(one, torch.nn.Dropout) and one.p > 0 and one.training for one in module.modules())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif dataclasses.is_dataclass(tree):  # an attention context
        for field_ in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, field_.name))
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
