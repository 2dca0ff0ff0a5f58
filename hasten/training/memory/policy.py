"""Runs the memory policy of a model: decides what each layer saves, recomputes or offloads, and explains out-of-memory
errors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from hasten.overlays import LayerOverlay
from hasten.state import find_state
from hasten.training.memory.oom import OomAdvisor
from hasten.training.memory.plan import LayerPlan
from hasten.training.memory.planner import UNKNOWN_PEAK, Planner
from hasten.training.memory.runner import LayerRunner
from hasten.units import format_bytes


class MemoryPolicy:
    """`ModelState.memory` of a causal LM. planner: which plan a batch gets. runner: runs the layers by it. advisor:
    explains out-of-memory errors."""

    def __init__(self, model: Any, mode: bool | str, budget: int | None = None, tile: int | None = None) -> None:
        """model: a causal LM. mode: False (advice only), True, "offload" or "auto". budget: bytes on the device that
        the process may use, None = what is free when a plan is made. tile: tokens per tile of the MLPs if the user
        asked for tiles, None = the plan chooses."""
        self.planner = Planner(model, mode, budget, tile)
        self.advisor = OomAdvisor(self.planner)
        self.runner = LayerRunner(self.planner, self.advisor)

    @property
    def mode(self) -> bool | str:
        return self.planner.mode

    @property
    def budget(self) -> int | None:
        return self.planner.budget

    @property
    def tile(self) -> int | None:
        return self.planner.tile

    @property
    def layers(self) -> list[LayerOverlay]:
        return self.planner.layers

    @property
    def latest(self) -> LayerPlan | None:
        """The plan of the last step, None before the first one."""
        return self.planner.latest

    def plan(self, batch: int, length: int) -> LayerPlan:
        """Returns the plan for `batch` sequences of `length` tokens; runs nothing."""
        return self.planner.plan(batch, length, self.runner.pinned)

    def devices(self) -> set[torch.device]:
        return self.planner.devices()

    def install(self) -> int:
        """Makes transformers run the layers through this policy. Returns how many layers there are."""
        return self.runner.install()

    def uninstall(self) -> None:
        self.runner.uninstall()

    def continue_from(self, earlier: MemoryPolicy | None) -> None:
        """Takes over what an earlier policy of the model measured before the first step. The optimizer's state has been
        allocated since, and measuring again would count it twice."""
        self.planner.other_bytes = None if earlier is None else earlier.planner.other_bytes

    def advising(self, batch_shape: tuple[int, int] | None) -> AbstractContextManager[None]:
        """See `OomAdvisor.advising`."""
        return self.advisor.advising(batch_shape)

    def watch_backward(self, outputs: Any) -> None:
        """See `OomAdvisor.watch_backward`."""
        self.advisor.watch_backward(outputs)

    def __str__(self) -> str:
        if not self.mode:
            return "every layer saves all activations"
        if self.latest is None:
            return "planned at the first step"
        peak = self.latest.peak
        if peak is UNKNOWN_PEAK:
            return str(self.latest)
        return f"{self.latest} (predicted peak {format_bytes(peak.total)}, in the {peak.when})"


def policy_of(model: Any) -> MemoryPolicy | None:
    """Returns the memory policy of a causal LM (or of the one in a PeftModel), None without one."""
    state = find_state(model)
    return state.memory if state is not None and isinstance(state.memory, MemoryPolicy) else None
