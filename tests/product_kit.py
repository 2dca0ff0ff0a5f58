"""What a model computes, seen from outside: torch's matrix products, and the Triton kernels that are launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

LEFT = {"mm": 0, "addmm": 1, "addmm_": 1}
"""Operators -> position of the left matrix among their arguments."""


class Product(NamedTuple):
    """left (rows, inner) @ right (inner, columns). right: the address of its first element."""

    rows: int
    inner: int
    columns: int
    right: int


class Products(TorchDispatchMode):
    """Lists the matrix products of its block, of backward passes too; Triton's are not among them.

    fail: (inner, columns, n), to run out of memory in the n-th product of this shape.
    """

    def __init__(self, fail: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.seen: list[Product] = []
        self.fail = fail

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = LEFT.get(func.overloadpacket.__name__)
        if left is not None:
            one, other = args[left : left + 2]
            self.seen.append(Product(*one.shape, other.shape[1], other.data_ptr()))
            shape = (one.shape[1], other.shape[1])
            if self.fail == (*shape, self.count(*shape)):
                raise torch.OutOfMemoryError("in the middle")
        return func(*args, **(kwargs or {}))

    def count(self, inner: int, columns: int) -> int:
        """How many products have this shape, with any number of rows."""
        return len(self.rows(inner, columns))

    def rows(self, inner: int, columns: int) -> list[int]:
        """The rows of each product of this shape, in order."""
        return [one.rows for one in self.seen if (one.inner, one.columns) == (inner, columns)]


class Launch(NamedTuple):
    """kernel: its name. shapes: of its arguments that are tensors."""

    kernel: str
    shapes: tuple[tuple[int, ...], ...]


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Lists the launches of Triton kernels, in the interpreter and on a GPU alike; replays of a CUDA graph are none."""
    seen: list[Launch] = []

    def listening(inner: Any) -> Any:
        def look_up(self: Any, grid: Any) -> Any:
            launch = inner(self, grid)

            def run(*args: Any, **kwargs: Any) -> Any:
                seen.append(Launch(self.__name__, tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))))
                return launch(*args, **kwargs)

            return run

        return look_up

    with pytest.MonkeyPatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):
            patch.setattr(kind, "__getitem__", listening(kind.__getitem__))
        yield seen
