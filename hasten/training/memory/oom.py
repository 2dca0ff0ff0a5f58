"""Explains out-of-memory errors of a training step: what the step was, and which changes would lower its peak.

A forward, and a layer that is recomputed, run inside `OomAdvisor.advising`, which adds a note to the error. The rest of
a backward has no Python code of hasten on its stack; there torch's observer of failed allocations logs the same text
just before the error.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hasten.training.memory.actions import UNIFORM_ACTIONS, ActivationAction
from hasten.training.memory.advice import StepConfig, advice, savings
from hasten.training.memory.costs import with_tile
from hasten.training.memory.plan import uniform_plan
from hasten.training.memory.planner import Planner
from hasten.units import format_bytes

logger = logging.getLogger(__name__)

NO_BACKWARD = -1
"""torch's id of the current graph task (one run of the autograd engine) outside of any backward."""


class OomAdvisor:
    """Explains the errors of one model. batch_shape: sequences and tokens per sequence of the last forward."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.batch_shape: tuple[int, int] | None = None
        self._depth = 0  # of nested `advising` contexts, whose errors get a note
        self._graph_task = NO_BACKWARD  # of the model's last backward
        self._is_attached = False

    def __getstate__(self) -> dict[str, Any]:
        """Drops the state of a running step and of this process's observer from copies."""
        return {**self.__dict__, "_depth": 0, "_graph_task": NO_BACKWARD, "_is_attached": False}

    @contextlib.contextmanager
    def advising(self, batch_shape: tuple[int, int] | None) -> Iterator[None]:
        """Adds the advice as a note to an out-of-memory error inside the block: a forward over a batch of this shape,
        or a part of it."""
        self.batch_shape = batch_shape
        self._depth += 1
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not getattr(error, "__notes__", ()) and (text := self.advice()):
                error.add_note(text)
            raise
        finally:
            self._depth -= 1

    def advice(self) -> str | None:
        """Describes the last step and every change that would lower its peak, in bytes; None for a model of unknown
        shape.

        Makes no new plan: measuring the bandwidth would allocate memory, of which there is none left.
        """
        planner = self.planner
        shape = planner.model_shape() if self.batch_shape is not None and planner.layers else None
        if self.batch_shape is None or shape is None:
            return None
        batch, length = self.batch_shape
        plan = planner.latest
        if plan is None:
            action = UNIFORM_ACTIONS.get(planner.mode, ActivationAction.OFFLOAD)
            plan = uniform_plan(shape, batch, length, action, planner.tile)
        config = StepConfig(batch, length, with_tile(plan.actions, planner.tile), plan.tile)
        predicted = format_bytes(config.peak(shape))
        count = f"{batch} sequence{'s' if batch != 1 else ''}"
        step = f"This step ran {count} of {length} tokens, with a predicted peak of {predicted} ({plan})."
        return f"{step}\n{advice(savings(shape, config))}"

    def watch_backward(self, outputs: Any) -> None:
        """Marks the backward through `outputs` (a tensor, or a tuple or mapping of them) as this model's own.

        A hook on the graph remembers the id of the backward when it begins. Adds no node to the graph and keeps no
        tensor alive.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not self._is_attached and torch.cuda.is_initialized():
            self._attach()
        reference = weakref.ref(self)

        def begin(_: Any) -> None:
            advisor = reference()
            if advisor is not None:
                advisor._graph_task = torch._C._current_graph_task_id()

        for tensor in _tensors(outputs):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(begin)

    def report_failure(self, size: int) -> None:
        """Logs the advice for a failed allocation of `size` bytes inside this model's backward; silent anywhere else,
        and where `advising` adds it to the error."""
        in_own_backward = self._graph_task != NO_BACKWARD and torch._C._current_graph_task_id() == self._graph_task
        if in_own_backward and not self._depth and (text := self.advice()):
            logger.error("out of memory in the backward: %.2f GiB more were requested. %s", size / 2**30, text)

    def _attach(self) -> None:
        """Attaches torch's observer once. torch calls every observer for every failed allocation and cannot detach one,
        so it refers to this object weakly."""
        self._is_attached = True
        reference = weakref.ref(self)

        def observe(device: int, size: int, limit: int, free: int) -> None:
            advisor = reference()
            if advisor is not None:
                advisor.report_failure(size)

        torch._C._cuda_attach_out_of_memory_observer(observe)  # pyright: ignore[reportAttributeAccessIssue]


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of a model's outputs, not those inside of nested tuples (hidden states, attentions,
    caches)."""
    if isinstance(outputs, torch.Tensor):
        yield outputs
        return
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else ()
    yield from (value for value in values if isinstance(value, torch.Tensor))
