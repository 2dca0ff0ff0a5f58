"""Selects the implementation of an op: by the tensor's device, or by name. There is no fallback at run time."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal

import torch

Backend = Literal["reference", "triton"]
ATTENTION = "attention"
EVERY_OP = "every op"

_INTERPRETED: ContextVar[frozenset[str | None]] = ContextVar("interpreted", default=frozenset())


def backend_for(x: torch.Tensor, wanted: Backend | None = None, op: str | None = None) -> Backend:
    """Returns `wanted` if given, else "triton" for a CUDA tensor and "reference" for any other (see `interpreted_kernels`).

    The kernels accumulate in fp32, so fp64 always takes the reference."""
    if wanted is not None:
        return wanted
    if x.dtype == torch.float64:
        return "reference"
    if x.is_cuda:
        return "triton"
    if torch.compiler.is_compiling():  # Dynamo cannot trace ContextVar.get
        return "reference"
    interpreted = _INTERPRETED.get()
    return "triton" if op in interpreted or EVERY_OP in interpreted else "reference"


@contextmanager
def interpreted_kernels(op: str = EVERY_OP) -> Iterator[None]:
    """Run CPU tensors through the Triton kernels of `op` (default: of every op), for tests of whole models without a GPU.

    Needs TRITON_INTERPRET=1 before triton is imported. Changes nothing for CUDA tensors, under torch.compile, or in other threads.
    """
    token = _INTERPRETED.set(_INTERPRETED.get() | {op})
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


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
