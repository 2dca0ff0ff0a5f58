"""Tells the host when every sequence has stopped, without making it wait for the GPU at each token."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

LAG = 2
"""Steps that the host is ahead of the GPU: the GPU has its next step queued while the host waits for an earlier one."""


@dataclass(frozen=True)
class _Step:
    """length: of the sequences with this step's token. stopped: (), on the host once `event` has passed. token_B: for a
    streamer. draws: how many numbers the device's random generator had drawn."""

    length: int
    stopped: torch.Tensor
    token_B: torch.Tensor | None
    event: torch.cuda.Event | None
    draws: int | None


class StopWatch:
    """Follows the steps of one call. On a GPU it looks at a step `lag` steps later: a few steps too many may run, whose tokens
    are dropped, whose streaming never happens, and whose random draws `finish` takes back."""

    def __init__(self, device: torch.device, streamer: Any, lag: int, draws: bool) -> None:
        """device: of the ids. draws: whether steps draw from its random generator."""
        self._streamer = streamer
        self._on_gpu = device.type == "cuda"
        self._lag = lag if self._on_gpu else 0
        self._pending: deque[_Step] = deque()
        self._last: _Step | None = None
        index = device.index if device.index is not None else -1
        self._generator = torch.cuda.default_generators[index] if self._on_gpu and draws else None

    def add(self, running_B: torch.Tensor, token_B: torch.Tensor, length: int) -> bool:
        """Takes a step: which sequences run on, and their tokens. Returns whether every sequence is known to have stopped."""
        stopped = self._to_host(~running_B.any())
        token = None if self._streamer is None else self._to_host(token_B)
        event = torch.cuda.Event() if self._on_gpu else None
        if event is not None:
            event.record()
        draws = None if self._generator is None else self._generator.get_offset()
        self._pending.append(_Step(length, stopped, token, event, draws))
        while len(self._pending) > self._lag and not self._ended:
            self._settle()
        return self._ended

    def finish(self) -> int | None:
        """Waits for the steps that are left. Returns the length at which the last sequence stopped, else that of the last step;
        None without a step."""
        while self._pending and not self._ended:
            self._settle()
        if self._last is None:
            return None
        if self._generator is not None and self._pending and self._last.draws is not None:
            self._generator.set_offset(self._last.draws)
        return self._last.length

    @property
    def _ended(self) -> bool:
        return self._last is not None and bool(self._last.stopped)

    def _settle(self) -> None:
        step = self._pending.popleft()
        if step.event is not None:
            step.event.synchronize()
        if step.token_B is not None:
            self._streamer.put(step.token_B.clone())
        self._last = step

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        if not self._on_gpu:
            return x.cpu()
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
