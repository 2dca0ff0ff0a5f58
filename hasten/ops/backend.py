"""Selects the implementation of an op: by the tensor's device, or by name. There is no fallback at run time."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Backend = Literal["reference", "triton"]


def backend_for(x: torch.Tensor, wanted: Backend | None = None) -> Backend:
    """Returns `wanted` if given, else "triton" for a CUDA tensor and "reference" for any other."""
    if wanted is not None:
        return wanted
    return "triton" if x.is_cuda else "reference"


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes x's device current: Triton launches on the current device, and two models may be on two devices."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Returns the bytes of shared memory that one thread block may use. Without a GPU (Triton's interpreter) those of
    an H200: 227 KiB."""
    if device.type != "cuda":
        return 227 * 2**10
    properties = torch.cuda.get_device_properties(device)
    return getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )  # torch on ROCm has the latter
