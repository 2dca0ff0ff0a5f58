"""Reads what a class's forward mentions, from its code object: attributes of the instance, and every other name.

A forward that mentions an attribute, an operation or a keyword that an overlay does not know may do something that the
overlay would leave out, in a mode or at a value that no trial call meets. So such a module stays stock.
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from hasten.overlays.cache_name import CACHE, OLD_CACHE
from hasten.patching.classes import stock_class

DOCSTRING_FLAG = 0x4000000
"""`CO_HAS_DOCSTRING` of Python 3.13, which `inspect` names only there."""


@dataclass(frozen=True)
class ForwardNames:
    """What the stock class's forward, and every method of the class that it calls, mention.

    parameters: of the forward, without self. attributes: names that the instance has and that are no methods.
    operations: all other names (globals, methods of tensors, fields of configs and outputs) and string literals.
    """

    parameters: tuple[str, ...]
    attributes: frozenset[str]
    operations: frozenset[str]

    def unknown(self, attributes: frozenset[str], operations: frozenset[str]) -> str | None:
        """Why the forward does more than the two sets say, None where it does not."""
        if extra := sorted(self.attributes - attributes):
            return f"its forward reads {', '.join(extra)}"
        if extra := sorted(self.operations - operations):
            return f"its forward uses {', '.join(extra)}"
        return None


def read_forward(module: nn.Module) -> ForwardNames | str:
    """The names in the forward of the module's stock class, or the reason why they cannot be read."""
    kind = stock_class(module)
    if kind.__call__ is not nn.Module.__call__ or kind.__getattr__ is not nn.Module.__getattr__:
        return "its class has its own __call__ or __getattr__"
    forward = _plain_function(inspect.getattr_static(kind, "forward"))
    if isinstance(forward, str):
        return f"its forward {forward}"
    functions, attributes, operations = [forward], set[str](), set[str]()
    for function in functions:
        for name in _mentioned(function):
            method = _own_member(kind, name)
            if isinstance(method, (FunctionType, classmethod, staticmethod)):
                plain = _plain_function(method)
                if isinstance(plain, str):
                    return f"its {name} {plain}"
                if plain not in functions:
                    functions.append(plain)
            elif method is not None or _has(module, name):
                attributes.add(name)
            else:
                operations.add(name)
    parameters = tuple(inspect.signature(forward).parameters)[1:]
    return ForwardNames(parameters, frozenset(attributes), frozenset(operations))


def _plain_function(function: Any) -> FunctionType | str:
    """The function under transformers' own decorators (a tuple as the output, another name for the cache), or why its
    code does not say all that a call does."""
    while isinstance(function, FunctionType) and (_returns_tuple(function) or _renames_cache(function)):
        function = function.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    if not isinstance(function, FunctionType):
        return f"is a {type(function).__name__}, not a function"
    if function.__closure__ or hasattr(function, "__wrapped__"):
        return "calls another one that only it knows (super, a decorator)"
    return function


def _returns_tuple(function: FunctionType) -> bool:
    decorated: Any = can_return_tuple(lambda self: None)
    return function.__code__ is decorated.__code__


def _renames_cache(function: FunctionType) -> bool:
    """Whether the function only takes the cache by its name before transformers 5.24 as well."""
    decorated: Any = deprecate_kwarg(OLD_CACHE, "0", CACHE)(lambda self: None)
    if function.__code__ is not decorated.__code__:
        return False
    names = inspect.getclosurevars(function).nonlocals
    return (names["old_name"], names["new_name"]) == (OLD_CACHE, CACHE)


def _mentioned(function: FunctionType) -> Iterator[str]:
    """Every global, attribute and string literal in the function's code, functions inside it included."""
    found: list[CodeType] = [function.__code__]
    for code in found:
        yield from code.co_names
        for constant in code.co_consts[1:] if _has_docstring(code) else code.co_consts:
            if isinstance(constant, CodeType):
                found.append(constant)
            elif isinstance(constant, str):
                yield constant


def _has_docstring(code: CodeType) -> bool:
    """Whether the first constant is the docstring: always so (or None) before Python 3.13, marked by a flag since."""
    marked = sys.version_info < (3, 13) or bool(code.co_flags & DOCSTRING_FLAG)
    return marked and bool(code.co_consts) and isinstance(code.co_consts[0], str)


def _own_member(kind: type, name: str) -> Any:
    """What the class or one that it extends defines under `name`, those of torch and of transformers' base excluded."""
    for base in kind.__mro__:
        if base in (nn.Module, PreTrainedModel):
            return None
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def _has(module: nn.Module, name: str) -> bool:
    """Whether the instance itself holds the name: a parameter, a buffer, a child or a Python attribute."""
    own = module.__dict__
    return name in own or any(name in own[group] for group in ("_parameters", "_buffers", "_modules"))
