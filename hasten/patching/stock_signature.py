"""Gives an overlay's forward the signature of the stock class that it stands for.

`inspect.signature` then shows transformers' arguments (trainers and `generate` read it), and an argument may be passed
by the name that the stock class uses. hasten's own extra arguments are keyword-only and not shown.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from hasten.overlays.cache_name import with_cache_name


@functools.cache
def positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of the arguments that may be passed by position, self included."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)


def adapt(forward: Any, stock: type) -> Callable[..., Any]:
    """Returns a function that runs `forward` and shows the signature of `stock.forward`.

    A copy of `forward` where both name their arguments alike, so that a call costs nothing more. Otherwise a wrapper
    that renames them.
    """
    ours, theirs = positional(forward), positional(stock.forward)
    parameters = inspect.signature(forward).parameters.values()
    by_keyword = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    renamed = {new: old for new, old in zip(theirs, ours, strict=False) if new != old and new not in by_keyword}
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    made = _renaming(forward, renamed) if renamed and not takes_any else _copy(forward)
    made.__signature__ = inspect.signature(stock.forward)  # pyright: ignore[reportFunctionMemberAccess]
    return made


def _renaming(forward: Callable[..., Any], renamed: dict[str, str]) -> FunctionType:
    @functools.wraps(forward)
    def forward_renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = with_cache_name(kwargs, "forward")
        for theirs, ours in renamed.items():
            if theirs in kwargs:
                kwargs[ours] = kwargs.pop(theirs)
        return forward(self, *args, **kwargs)

    return forward_renamed  # pyright: ignore[reportReturnType]


def _copy(forward: FunctionType) -> FunctionType:
    copy = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copy, forward)  # pyright: ignore[reportReturnType]
