"""Turns tokens that arrive one by one into text: whole characters only, and no text beyond a stop string."""

from collections.abc import Callable, Sequence
from typing import Any

INCOMPLETE = "\ufffd"
"""How tokenizers decode the bytes of a character that is not complete."""


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Returns the tokenizer's `decode` without special tokens."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


class TextStream:
    """The parts that `add` and `end` return are, joined, the decoded tokens up to the first stop string.

    What may still become a stop string or a character is held back until the next token decides.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        """decode: ids -> text. stop: strings that end the text and are not part of it; none may be empty."""
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0  # ids from _start are decoded; those before _read have been returned or held back
        self._known = self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Returns the text that this token completes. Sets `stopped` at a stop string."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith(INCOMPLETE):
            return ""
        return self._release(self._advance(text))

    def end(self) -> str:
        """Returns what was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._release(self._advance(self._decode(self._ids[self._start :])))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> str:
        """Returns what `text`, the decoded window, adds. The window then starts at the tokens just read: a token's text
        may depend on the one before it (a leading space), not on those further back."""
        new = text[len(self._known) :]
        self._start, self._read = self._read, len(self._ids)
        self._known = self._decode(self._ids[self._start :])
        return new

    def _release(self, new: str) -> str:
        self._held += new
        found = [place for place in (self._held.find(one) for one in self._stop) if place >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, one) for one in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of `text` are the start of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
