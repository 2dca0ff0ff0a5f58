"""One sequence of a batch: its prompt, its parameters, and what has come of it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from hasten.inference.decode.sampling import Sampling
from hasten.inference.text import TextStream

Finish = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Limits:
    """max_tokens: the most new tokens, at least 1. eos: ids that end the sequence; they are counted, and are not
    text."""

    max_tokens: int
    eos: Collection[int] = ()


@dataclass(frozen=True)
class Piece:
    """What a step has added. finish: set in the last piece only. error: why a request failed."""

    text: str = ""
    finish: Finish | None = None
    error: str = ""


class Request:
    """tokens: generated so far, EOS included. finish: why it ended, None = it has not.

    All but `cancel` is called by the thread that decodes; `deliver` is called there, with every piece of text.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        limits: Limits,
        sampling: Sampling,
        text: TextStream,
        deliver: Callable[[Piece], None] = lambda piece: None,
    ) -> None:
        self.prompt, self.limits, self.sampling = list(prompt), limits, sampling
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.cancelled = False
        self._text, self._deliver = text, deliver

    def cancel(self) -> None:
        """Asks for the end before the next step, from any thread."""
        self.cancelled = True

    def take(self, token: int) -> None:
        """Receives the next token: delivers its text, sets `finish` where it is the last."""
        self.tokens.append(token)
        if token in self.limits.eos:
            self._end("stop")
            return
        text = self._text.add(token)
        if self._text.stopped:
            self._end("stop", text)
        elif len(self.tokens) >= self.limits.max_tokens:
            self._end("length", text)
        elif text:
            self._deliver(Piece(text))

    def fail(self, error: str) -> None:
        """Ends the request with a reason."""
        self.finish = "failed"
        self._deliver(Piece(finish="failed", error=error))

    def drop(self) -> None:
        """Ends a request that was cancelled."""
        self.finish = "cancelled"
        self._deliver(Piece(finish="cancelled"))

    def _end(self, why: Finish, text: str = "") -> None:
        rest = self._text.end()
        self.finish = "stop" if self._text.stopped else why
        self._deliver(Piece(text + rest, self.finish))
