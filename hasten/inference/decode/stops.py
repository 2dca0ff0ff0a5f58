"""Tells the host when every sequence has stopped, without making it wait for the GPU at each token."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import PrefixConstrainedLogitsProcessor

LAG = 2
"""Steps that the host is ahead of the GPU: the GPU has its next step queued while the host waits for an earlier one."""


def lag_for(device: torch.device, called: Iterable[Any]) -> int:
    """Returns how many steps later the host may look at a step: none on a CPU, and none where code of the user (`called`: logits
    processors and criteria) would see a step too many."""
    own = all(
        type(one).__module__.partition(".")[0] == "transformers"
        and not isinstance(one, PrefixConstrainedLogitsProcessor)
        for one in called
    )
    return LAG if own and device.type == "cuda" else 0


@dataclass(frozen=True)
class _Step:
    """length: of the sequences with this step's token. stopped: (), on the host once `event` has passed. token_B: for a
    streamer. draws: the state of the random generator after the step's draw."""

    length: int
    stopped: torch.Tensor
    token_B: torch.Tensor | None
    event: torch.cuda.Event | None
    draws: Any


class StopWatch:
    """Follows the steps of one call and looks at each `lag` steps later. So a few steps too many may run: their tokens are
    dropped, never streamed, and `finish` takes back their random draws."""

    def __init__(self, device: torch.device, streamer: Any, lag: int, draws: bool) -> None:
        """device: of the ids. draws: whether steps draw from its random generator."""
        self._streamer, self._lag = streamer, lag
        self._on_gpu = device.type == "cuda"
        self._pending: deque[_Step] = deque()
        self._last: _Step | None = None
        self._generator = _generator_of(device) if lag and draws else None

    def add(self, running_B: torch.Tensor, token_B: torch.Tensor, length: int) -> bool:
        """Takes a step: which sequences run on, and their tokens. Returns whether every sequence is known to have stopped."""
        stopped = self._to_host(~running_B.any())
        token = None if self._streamer is None else self._to_host(token_B)
        event = torch.cuda.Event() if self._on_gpu else None
        if event is not None:
            event.record()
        self._pending.append(_Step(length, stopped, token, event, self._draws()))
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
        if self._generator is not None and self._pending:
            set_state = self._generator.set_offset if self._on_gpu else self._generator.set_state
            set_state(self._last.draws)
        return self._last.length

    @property
    def _ended(self) -> bool:
        return self._last is not None and bool(self._last.stopped)

    def _draws(self) -> Any:
        if self._generator is None:
            return None
        return self._generator.get_offset() if self._on_gpu else self._generator.get_state()

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


def _generator_of(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
