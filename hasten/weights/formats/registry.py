"""The list of known weight formats, which a program may extend."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hasten.weights.formats.base import WeightFormat

UNIQUE = ("name", "load_argument", "choice", "save_method")
"""Fields that select a format: no two formats share a value."""


class Registry:
    """Weight formats, in the order in which `matches` is called.

    It is the same for all threads, unlike a ContextVar: backward passes and servers run a model in threads of their own.
    """

    def __init__(self, *formats: WeightFormat) -> None:
        self.formats = formats
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[WeightFormat]:
        return iter(self.formats)

    @contextmanager
    def registered(self, *added: WeightFormat) -> Iterator[None]:
        """See `weights.formats.registered`."""
        with self._lock:
            _refuse_duplicates((*added, *self.formats))
            self.formats = (*added, *self.formats)
        try:
            yield
        finally:
            with self._lock:  # another block may have begun since, and may end later
                self.formats = tuple(one for one in self.formats if not any(one is other for other in added))


def _refuse_duplicates(formats: tuple[WeightFormat, ...]) -> None:
    for field in UNIQUE:
        values = [value for one in formats if (value := getattr(one, field)) is not None]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"two weight formats have {field} {twice[0]!r}: give the new one another {field}")
