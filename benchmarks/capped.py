"""A cap on what one process can take of a card, as if the card had no more.

torch's allocator gets the cap less the CUDA context of this process, and asking for more is an out-of-memory error. A second
process holds what the card has beyond, so that a library which asks the card how much is free is told the truth as well.
Nothing else may run on the card meanwhile.
"""

import gc
import json
import sys
from types import TracebackType

import torch

from benchmarks.jobs import GIB
from benchmarks.workers import Worker

SLACK = 2**28
"""Bytes that the other process leaves beyond the cap: for what drivers load late, outside torch's allocator."""
LIMIT_S = 120


class Card:
    """This process's GPU, or without one nothing that could be capped. A context manager: the other process ends with it.

    Made once the process has taken steps: what the context holds by then, all kernels in it, is what every cap pays for.
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
        self.rest = Worker("rest", [sys.executable, "-m", "benchmarks.capped"])
        self.rest.reply(LIMIT_S)

    def __enter__(self) -> "Card":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.rest is not None:
            self.rest.end()

    def cap(self, gib: float | None) -> int | None:
        """Sets the cap, or takes it away. Returns the bytes that torch's allocator may take, None = what there is."""
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
    """The other process: holds as many bytes as it is told."""
    held = torch.empty(0, device="cuda")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        del held
        torch.cuda.empty_cache()
        held = torch.empty(json.loads(line)["bytes"], dtype=torch.uint8, device="cuda")
        print(json.dumps({"held": held.numel()}), flush=True)


if __name__ == "__main__":
    hold()
