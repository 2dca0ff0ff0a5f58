"""Running out of memory in a backward.

A forward, and a layer that is made again, add to an error what would make room (`MemoryPolicy.advising`). A backward of layers that
keep everything runs without Python of ours on its stack; there torch's observer of failed allocations puts it in the log.
"""

import functools
import logging
import weakref
from typing import Protocol

import torch

logger = logging.getLogger(__name__)


class Adviser(Protocol):
    """A memory policy. inside: how many of its own calls run now, which explain their errors themselves."""

    inside: int

    def advice(self) -> str | None: ...


_last: list[weakref.ref[Adviser]] = []
"""The policy whose model ran last, alone: whose backward comes next."""


def watch(policy: Adviser) -> None:
    """A backward that runs out of memory is from now on this policy's to explain."""
    _last[:] = [weakref.ref(policy)]
    if torch.cuda.is_initialized():
        _observe_failures()


@functools.cache
def _observe_failures() -> None:
    # As torch's own guide to memory use has it; an observer cannot be taken off, so there is one for all models.
    torch._C._cuda_attach_out_of_memory_observer(_say)  # pyright: ignore[reportAttributeAccessIssue]


def _say(device: int, size: int, limit: int, free: int) -> None:
    policy = _last[0]() if _last else None
    in_backward = torch._C._current_graph_task_id() != -1
    if in_backward and policy is not None and not policy.inside and (text := policy.advice()):
        logger.error("out of memory in a backward, where %.2f GiB more were asked for. %s", size / 2**30, text)
