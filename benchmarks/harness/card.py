"""Caps the memory that one process can use of a GPU, as if the GPU had no more.

torch's allocator gets the cap less this process's CUDA context; asking for more is an out-of-memory error. A second process
holds the rest of the GPU, so that a library that asks for free memory sees the cap too. Nothing else may run on the GPU.
"""

import gc
import json
import sys

import torch

from benchmarks.harness.jobs import GIB
from benchmarks.harness.workers import Worker, module

SLACK = 2**28
"""Bytes that the second process leaves free beyond the cap, for what drivers load later outside torch's allocator."""
LIMIT_S = 120


class Card:
    """This process's GPU, capped; without a GPU, nothing is. A context manager that ends the second process.

    Create it after the process has taken steps, so that the CUDA context that every cap pays for includes all kernels.
    """

    def __init__(self) -> None:
        self.rest: Worker | None = None
        self.context = 0
        if not torch.cuda.is_available():
            return
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        free, self.whole = torch.cuda.mem_get_info()
        self.context = self.whole - free - torch.cuda.memory_reserved()
        self.rest = Worker("rest", module("harness.card"))
        self.rest.reply(LIMIT_S)

    def __enter__(self) -> "Card":
        return self

    def __exit__(self, *error: object) -> None:
        if self.rest is not None:
            self.rest.end()

    def cap(self, gib: float | None) -> int | None:
        """Sets the cap, None = none. Returns the bytes that torch's allocator may take, None = all."""
        allowed = None if gib is None else int(gib * GIB) - self.context
        if self.rest is None:
            return allowed
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0 if allowed is None else min(1.0, allowed / self.whole))
        self.rest.ask(LIMIT_S, "hold", bytes=0)
        if allowed is not None:
            free, _ = torch.cuda.mem_get_info()
            beyond = free + torch.cuda.memory_reserved() - allowed - SLACK
            self.rest.ask(LIMIT_S, "hold", bytes=max(0, beyond))
        return allowed


def hold() -> None:
    """The second process: holds the number of bytes that each command names."""
    held = torch.empty(0, device="cuda")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        del held
        torch.cuda.empty_cache()
        held = torch.empty(json.loads(line)["bytes"], dtype=torch.uint8, device="cuda")
        print(json.dumps({"held": held.numel()}), flush=True)


if __name__ == "__main__":
    hold()
