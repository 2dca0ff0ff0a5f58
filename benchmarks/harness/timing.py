"""Random tensors, and times of calls on the device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
"""Triton's interpreter, used without a GPU, has no bf16 arithmetic."""
Row = dict[str, Any]


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype) * scale


def milliseconds(function: Callable[[], Any], warm_ms: int = 25, measure_ms: int = 100) -> float:
    """Median time of a call, by device events, with the L2 cache flushed before each."""
    from triton.testing import do_bench

    median = do_bench(function, warmup=warm_ms, rep=measure_ms, return_mode="median")
    assert isinstance(median, float)
    return median


def device_ms(function: Callable[[], Any], repeats: int = 20) -> float:
    """Milliseconds that the device is busy in one call. Small ops wait for the host longer than they run."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in recorded.key_averages()) / 1e3 / repeats


def rows(calls: Mapping[str, Callable[[], Any]], moved: float, flops: float, **how: int) -> list[Row]:
    """{"op", "ms", "bytes", "flops"} of each call, all of which must move and compute as much. how: of `milliseconds`."""
    return [{"op": op, "ms": milliseconds(call, **how), "bytes": moved, "flops": flops} for op, call in calls.items()]
