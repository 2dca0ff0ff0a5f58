"""Which implementation of an op runs: by the tensor's device, or by name, strictly. Nothing is probed, nothing falls back."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

Backend = Literal["reference", "triton"]


def backend_for(x: torch.Tensor, wanted: Backend | None = None) -> Backend:
    """`wanted` where given, else "triton" for a CUDA tensor and "reference" for any other."""
    if wanted is not None:
        return wanted
    return "triton" if x.is_cuda else "reference"


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes x's device the current one, on which Triton launches; two models may live on two devices."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block of threads may take there; what an H200 has where there is no GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 227 * 2**10
    properties = torch.cuda.get_device_properties(device)
    return getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )  # torch on ROCm has the latter
