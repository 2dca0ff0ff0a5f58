"""What a plan is made for, beside the batch's shape: a model that changes between steps gets another plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch


class PlanKey(NamedTuple):
    """As told by the first layer and the last, since a look at every weight of a large model costs milliseconds a step.

    dtype: of autocast, where it is on. stored, trained: bytes of weights. accumulates: whether gradients of a step before are there.
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
    """Autocast's, None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def coarse(length: int) -> int:
    """`length` rounded up by at most a sixteenth, and to a multiple of 64 beyond 1024: 16 lengths for each power of two."""
    step = 1 << max(0, (length - 1).bit_length() - 5)
    return -(-length // step) * step


def processes_here() -> int:
    """Processes of this training run on this machine, all of which pin host memory."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    # torchrun tells its processes how many they are on one machine through this variable and in no other way.
    return int(os.environ.get("LOCAL_WORLD_SIZE", torch.distributed.get_world_size()))
