"""Converts the arguments of a call to the fields of a dataclass."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from hasten.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")


def none_if_left_out(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator that passes None for each argument of `names` that the caller leaves out.

    So `load_in_4bit: bool = True` stays the signature that callers and `inspect.signature` see, and the function can
    still tell the default from an explicit True.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            return function(*args, **{**dict.fromkeys(set(names) - set(given)), **kwargs})  # pyright: ignore[reportCallIssue]

        return call

    return decorate


def fields_from_call(kind: type, args: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments for the dataclass `kind`: `args` in the order of its fields, unknown names of
    `named` in `extra`.

    Raises OptionError for more positional arguments than fields.
    """
    names = [f.name for f in dataclasses.fields(kind) if f.name != "extra"]
    if len(args) > len(names):
        raise OptionError(
            kind.__name__, [f"{len(args)} positional arguments were given, it takes at most {len(names)}"]
        )
    fields = {**dict(zip(names, args, strict=False)), **{name: named[name] for name in named if name in names}}
    return {**fields, "extra": {name: value for name, value in named.items() if name not in names}}
