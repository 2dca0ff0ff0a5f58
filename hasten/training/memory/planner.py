"""Chooses the plan of a batch from the available memory and what the process has allocated; caches plans per batch
shape."""

from __future__ import annotations

import logging
from typing import Any

import psutil
import torch
from torch import nn

from hasten.errors import CheckpointError
from hasten.overlays import LayerOverlay, MLPOverlay
from hasten.training.memory import bandwidth
from hasten.training.memory.actions import UNIFORM_ACTIONS, ActivationAction
from hasten.training.memory.costs import ModelShape, Peak
from hasten.training.memory.plan import LayerPlan, plan_layers, uniform_plan
from hasten.training.memory.plan_key import PlanKey, compute_dtype, local_processes, round_up_length
from hasten.units import format_bytes

logger = logging.getLogger(__name__)

MARGIN = 0.01
"""Fraction of a budget that plans leave unused, for the error of the prediction."""
ALLOCATOR_FRACTION = 0.05
"""Fraction of the device's memory left to the allocator's fragmentation where no budget was given."""
MAX_PINNED_FRACTION = 0.6
"""Fraction of the free CPU memory that all processes of this machine together may pin."""
UNKNOWN_PEAK = Peak("unknown", 0, 0, 0, 0, 0)
"""The plan of a model whose layers the formulas do not know."""
MAX_EXACT_PLANS = 16
"""Number of plans made for the exact batch shape; after that, lengths are rounded up (`round_up_length`)."""
PLAN_CACHE_SIZE = 256
"""Number of cached plans; the oldest is dropped."""


class Planner:
    """Makes and caches the plans of one model. `latest`: the plan of the running or last step, None before the first
    one."""

    def __init__(self, model: Any, mode: bool | str, budget: int | None, tile: int | None) -> None:
        """model: a causal LM. mode: False, True, "offload" or "auto". budget: bytes on the device that the process may
        use, None = what is free when a plan is made. tile: tokens per tile of MLPs if the user asked for tiles, None =
        the plan chooses."""
        self.model = model
        self.mode = mode
        self.budget = budget
        self.tile = tile
        self.margin = MARGIN
        self.cache_size = PLAN_CACHE_SIZE
        self.layers: list[LayerOverlay] = [module for module in model.modules() if isinstance(module, LayerOverlay)]
        self.plans: dict[tuple[int, int, PlanKey], LayerPlan] = {}
        self.latest: LayerPlan | None = None
        self.other_bytes: int | None = None
        """Bytes that the process had allocated besides the model before its first step: batches, other models. None =
        not measured yet."""

    def __getstate__(self) -> dict[str, Any]:
        """Drops measurements of this process from copies."""
        return {**self.__dict__, "plans": {}, "latest": None, "other_bytes": None}

    def plan(self, batch: int, length: int, pinned: int = 0) -> LayerPlan:
        """Returns the plan for `batch` sequences of `length` tokens, from the cache if there is one.

        pinned: bytes of CPU memory that the process has pinned for offloading already.
        """
        key = PlanKey.of(self.layers)
        if (batch, length, key) not in self.plans and len(self.plans) >= MAX_EXACT_PLANS:
            length = round_up_length(length)
        plan = self.plans.get((batch, length, key))
        if plan is None:
            plan = self.plans[batch, length, key] = self.new_plan(batch, length, pinned)
            if len(self.plans) > self.cache_size:
                del self.plans[next(iter(self.plans))]
            if not plan.fits:
                logger.warning(
                    "no plan for %d x %d tokens fits the memory budget; the one with the lowest peak needs %s",
                    batch,
                    length,
                    format_bytes(plan.peak.total),
                )
        return plan

    def new_plan(self, batch: int, length: int, pinned: int) -> LayerPlan:
        """Makes the plan that `plan` caches."""
        device = next(self.layers[0].parameters()).device
        several = len(self.devices()) > 1
        action = UNIFORM_ACTIONS.get(self.mode, ActivationAction.OFFLOAD if several else None)
        shape = self.model_shape()
        if shape is None:
            return LayerPlan((action or ActivationAction.OFFLOAD,) * len(self.layers), self.tile, UNKNOWN_PEAK)
        if self.other_bytes is None:
            hidden = batch * length * shape.hidden * shape.itemsize  # allocated already, and part of the plan's peak
            self.other_bytes = max(0, _bytes_besides(self.model, shape, device) - hidden)
        if action is not None:
            return uniform_plan(shape, batch, length, action, self.tile)
        budget = int(self._device_bytes(device) * (1 - self.margin)) - self.other_bytes
        speed, accumulates = bandwidth.measure(device), PlanKey.of(self.layers).accumulates
        return plan_layers(
            shape, batch, length, budget, speed, self._tiles(), _pinnable_bytes() + pinned, accumulates=accumulates
        )

    def devices(self) -> set[torch.device]:
        """Returns the devices of the layers. If there are several no plan is made, and every layer gets OFFLOAD."""
        return {next(layer.parameters()).device for layer in self.layers}

    def model_shape(self) -> ModelShape | None:
        """Reads the model as it is now; None for layers that the formulas do not know, such as an MLP of the user's
        own."""
        try:
            return ModelShape.of_model(self.model, compute_dtype(next(self.layers[0].parameters()).device))
        except CheckpointError as error:
            if self.mode == "auto" and not self.plans:
                logger.warning(
                    "no memory plan can be made, so every layer is recomputed and its input offloaded: %s", error
                )
            return None

    def _tiles(self) -> tuple[int | None, ...]:
        """Returns the tile sizes that a plan may use: () = any, (None,) = none, since tiles would change dropout's
        random numbers."""
        if any(not isinstance(layer.mlp, MLPOverlay) or _has_active_dropout(layer.mlp) for layer in self.layers):
            return (None,)
        return () if self.tile is None else (self.tile,)

    def _device_bytes(self, device: torch.device) -> int:
        """Returns the bytes of the device's memory that this process may use."""
        if self.budget is not None:
            return self.budget
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return free + torch.cuda.memory_reserved(device) - int(ALLOCATOR_FRACTION * total)
        return psutil.virtual_memory().available + sum(t.nbytes for t in self.model.parameters())


def _pinnable_bytes() -> int:
    """Returns the bytes of CPU memory that this process may pin, beyond what it has pinned."""
    return int(psutil.virtual_memory().available * MAX_PINNED_FRACTION / local_processes())


def _bytes_besides(model: Any, shape: ModelShape, device: torch.device) -> int:
    """Returns the bytes allocated on a GPU besides the model's weights and gradients; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return max(0, torch.cuda.memory_allocated(device) - shape.weights - gradients)


def _has_active_dropout(module: nn.Module) -> bool:
    return any(isinstance(one, nn.Dropout) and one.p > 0 and one.training for one in module.modules())
