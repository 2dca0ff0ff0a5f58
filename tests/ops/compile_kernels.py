"""Cross-compiles kernels for a GPU that this machine lacks: `python compile_kernels.py CAPABILITY [all]`. Nothing is launched.

Without "all", only those that take the most shared memory. Each launch becomes a warm-up compilation for its arguments, down to
machine code (ptxas comes with Triton). Prints a line per variant: the kernel's name and its bytes of shared memory per block.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import inputs
from benchmarks.inputs import SMALL, Sizes
from benchmarks.kernel_calls import backward, call_all
from hasten.ops.attention import attention
from hasten.ops.attention.kernels import forward as attention_kernel
from hasten.ops.lora import lora_linears
from hasten.ops.lora.kernels import lora_delta as delta_kernel

ROOM = {75: 64, 80: 163, 89: 99, 90: 227, 120: 99}
"""Compute capability -> KiB of shared memory per thread block (CUDA programming guide)."""
CHANNELS = (64, 128, 256)


class AbsentGPU:
    """The part of Triton's driver interface that a compilation calls."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: Any, grid: Any) -> Any:
    def launch(*args: Any, **kwargs: Any) -> None:
        if "UPCAST" in kwargs:
            kwargs["UPCAST"] = False  # only the interpreter needs it
        print(kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **kwargs).metadata.shared)

    return launch


def large(dtype: torch.dtype) -> None:
    """Launches with the head sizes and ranks of real models, which take the most shared memory."""
    for channels in CHANNELS:
        sizes = Sizes(1, 64, heads=4, kv=2, dim=channels, dtype=dtype)
        q, k, v = (one.requires_grad_() for one in inputs.qkv_heads(sizes))
        backward([attention(q, k, v, 0.1, 16, backend="triton")])
    for rank, out, with_residual in (
        (16, 2048, False),
        (delta_kernel.MAX_RANK_BACKWARD, 2048, False),
        (delta_kernel.MAX_RANK, 256, True),
    ):
        sizes = Sizes(2, 64, 256, rank=rank, dtype=dtype)
        x, residual = (inputs.stream(sizes).requires_grad_() for _ in range(2))
        linear = inputs.adapted(sizes, out, sizes.width)
        backward(lora_linears(x, [linear], residual if with_residual else None, backend="triton"))


def main(capability: int, every: bool) -> None:
    driver.set_active(AbsentGPU(capability))  # pyright: ignore[reportArgumentType]
    JITFunction.__getitem__ = compile_only  # pyright: ignore[reportAttributeAccessIssue]
    for module in (attention_kernel, delta_kernel):
        module.shared_memory = lambda device: ROOM[capability] * 2**10
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    if every:
        call_all(sizes=replace(SMALL, dtype=dtype))
    large(dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["all"])
