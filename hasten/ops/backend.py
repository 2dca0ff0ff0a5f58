"""Which implementation of an op runs: by the tensor's device, or by name, strictly. Nothing is probed, nothing falls back."""

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
