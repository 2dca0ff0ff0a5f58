"""How fast a device computes and how fast its link to host memory is: what decides whether a copy hides behind work."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PROBE_BYTES = 2**26
PROBE_SIDE = 4096
REPEATS = 4


@dataclass(frozen=True)
class DeviceSpeed:
    """bytes_per_s: of one direction of the link to pinned host memory. flops_per_s: of products in the compute dtype."""

    bytes_per_s: float
    flops_per_s: float


@functools.cache
def measure(device: torch.device) -> DeviceSpeed | None:
    """Measures a GPU once in a process, in some 50 ms. None for a CPU, whose memory is the host's."""
    if device.type != "cuda":
        return None
    here = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    there = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    square = torch.zeros(PROBE_SIDE, PROBE_SIDE, dtype=torch.bfloat16, device=device)
    copying = _seconds(device, lambda: there.copy_(here, non_blocking=True))
    multiplying = _seconds(device, lambda: square @ square)
    return DeviceSpeed(PROBE_BYTES / copying, 2 * PROBE_SIDE**3 / multiplying)


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    work()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / REPEATS
