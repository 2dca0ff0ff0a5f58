"""The thread that owns the model: requests wait in a bounded queue, and enter the batch as rows become free."""

import logging
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from hasten.errors import HastenError
from hasten.inference.decode.batch import DecodeBatch, unbatched
from hasten.inference.decode.request import Request
from hasten.serving.stock import StockRunner
from hasten.state import causal_lm_of

log = logging.getLogger(__name__)


class Busy(HastenError):
    """The queue is full; the request may be sent again later."""


class Unavailable(HastenError):
    """The worker has stopped."""


class Runner(Protocol):
    """What decodes: `DecodeBatch` or `StockRunner`. capacity: tokens of a sequence. free: rows that a request can
    enter."""

    @property
    def capacity(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    def admit(self, request: Request) -> None: ...
    def advance(self) -> None: ...
    def clear(self) -> None: ...


def choose_runner(model: Any, rows: int, devices: Sequence[str] = ("cuda",)) -> tuple[Runner, str]:
    """Returns what decodes for this model, and a line that says so and why.

    model: a causal LM or a PeftModel. devices: kinds of devices that continuous batching serves.
    """
    causal_lm = causal_lm_of(model)
    prompts = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    reason = "the adapter adds to the prompt" if prompts else unbatched(causal_lm, devices)
    if reason is None:
        return DecodeBatch(causal_lm, rows), f"continuous batching of up to {rows} sequences"
    return StockRunner(model), f"one request at a time through model.generate, since {reason}"


class Worker:
    """Only its thread calls the model. `submit` may be called from any thread."""

    def __init__(self, runner: Runner, device: torch.device, waiting: int = 64) -> None:
        """waiting: the most requests in the queue."""
        self.runner, self.waiting = runner, waiting
        self._device = device
        self._queue: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._stopped = ""
        self._thread = threading.Thread(target=self._run, name="hasten-worker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends all requests and the thread."""
        with self._changed:
            self._stopped = self._stopped or "the server is shutting down"
            for request in (*self._queue, *self._running):
                request.cancel()
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues all of the requests, or raises Busy or Unavailable and queues none."""
        with self._changed:
            if self._stopped:
                raise Unavailable(f"no request can be served: {self._stopped}.")
            waiting = sum(not request.cancelled for request in self._queue)
            if waiting + len(requests) > self.waiting:
                raise Busy(f"{waiting} of {self.waiting} places in the queue are taken. Send the request again later.")
            self._queue.extend(requests)
            self._changed.notify()

    def _run(self) -> None:
        try:
            own = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
            with torch.no_grad(), own:  # both are settings of a thread
                while self._work():
                    pass
        except BaseException as error:
            with self._changed:
                self._stopped = f"its worker has stopped ({type(error).__name__}: {error})"
            log.critical("the worker has stopped", exc_info=error)
            raise
        finally:
            for request in (*self._queue, *self._running):
                if request.finish is None:
                    request.fail(self._stopped)

    def _work(self) -> bool:
        """Lets one request in and runs one step. Returns False at the end."""
        with self._changed:
            while not (self._queue or self._running or self._stopped):
                self._changed.wait()
            if self._stopped:
                return False
            entering = self._queue.popleft() if self._queue and self.runner.free else None
            if entering is not None:
                self._running.append(entering)
        if entering is not None:
            self._admit(entering)
        try:
            self.runner.advance()
        except RuntimeError as error:  # torch's errors, out of memory included
            log.error("a step has failed", exc_info=error)
            for request in self._running:
                if request.finish is None:
                    request.fail(f"a step has failed: {error}")
            self.runner.clear()
        self._running = [request for request in self._running if request.finish is None]
        return True

    def _admit(self, request: Request) -> None:
        if request.cancelled:
            request.drop()
            return
        try:
            self.runner.admit(request)
        except (HastenError, RuntimeError) as error:
            log.error("a request has failed", exc_info=error)
            if request.finish is None:
                request.fail(str(error))
