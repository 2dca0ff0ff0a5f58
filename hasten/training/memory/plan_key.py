"""Defines what a plan depends on besides the batch's shape; a model that changes between steps gets a new plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch


class PlanKey(NamedTuple):
    """The cache key of a plan. Read from the first and the last layer only: visiting every weight of a large model
    costs milliseconds per step.

    dtype: autocast's, None where it is off. stored, trained: bytes of weights, and of those that train. accumulates:
    whether gradients of an earlier micro-batch are present.
    """

    dtype: torch.dtype | None
    stored: int
    trained: int
    accumulates: bool

    @classmethod
    def of(cls, layers: Sequence[torch.nn.Module]) -> PlanKey:
        weights = [p for layer in (layers[0], layers[-1]) for p in layer.parameters()]
        trained = [p for p in weights if p.requires_grad]
        accumulates = any(p.grad is not None for p in trained)
        dtype = compute_dtype(weights[0].device)
        return cls(dtype, sum(p.nbytes for p in weights), sum(p.nbytes for p in trained), accumulates)


def compute_dtype(device: torch.device) -> torch.dtype | None:
    """Returns autocast's dtype, None where autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def round_up_length(length: int) -> int:
    """Rounds `length` up by at most 1/16, and to a multiple of 64 beyond 1024: 16 lengths for each power of two."""
    step = 1 << max(0, (length - 1).bit_length() - 5)
    return -(-length // step) * step


def local_processes() -> int:
    """Returns how many processes of this training run share this machine's CPU memory."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    # LOCAL_WORLD_SIZE is the only way in which torchrun tells its processes how many of them run on one machine.
    return int(os.environ.get("LOCAL_WORLD_SIZE", torch.distributed.get_world_size()))
