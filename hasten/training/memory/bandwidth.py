"""Measures a device's matmul speed and its bandwidth to CPU memory, which decide whether an offload hides behind compute."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PROBE_BYTES = 2**26
"""Size of the measured copy."""
PROBE_SIDE = 4096
"""Rows and columns of the measured matmul's operands."""
REPEATS = 4


@dataclass(frozen=True)
class DeviceSpeed:
    """bytes_per_s: of a copy to pinned CPU memory, one direction. flops_per_s: of a 16-bit matmul."""

    bytes_per_s: float
    flops_per_s: float


@functools.cache
def measure(device: torch.device) -> DeviceSpeed | None:
    """Measures a GPU, once per process, in about 50 ms. None for a CPU, which has nothing to offload to."""
    if device.type != "cuda":
        return None
    on_device = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    on_host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    square = torch.zeros(PROBE_SIDE, PROBE_SIDE, dtype=torch.bfloat16, device=device)
    copy_seconds = _seconds(device, lambda: on_host.copy_(on_device, non_blocking=True))
    matmul_seconds = _seconds(device, lambda: square @ square)
    return DeviceSpeed(PROBE_BYTES / copy_seconds, 2 * PROBE_SIDE**3 / matmul_seconds)


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    work()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / REPEATS
