"""Validators of single argument values, and messages that several checks use."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Rule: TypeAlias = Callable[[Any], str | None]
"""A validator: value -> None if it is valid, else what it must be."""


def is_integer(value: Any, least: int) -> bool:
    """Returns whether `value` is an int of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive_integer(value: Any) -> str | None:
    """Validates a count or a rank."""
    return None if is_integer(value, 1) else "must be a positive integer"


def seed(value: Any) -> str | None:
    """Validates `random_state`."""
    return None if is_integer(value, 0) else "must be an integer of at least 0"


def broken_rules(options: object, rules: Mapping[str, Rule]) -> dict[str, str]:
    """Returns {argument: problem} for each argument of `options` whose value its validator refuses."""
    found = {}
    for name, rule in rules.items():
        value = getattr(options, name)
        if (problem := rule(value)) is not None:
            found[name] = f"{name}={value!r}: {problem}"
    return found


def not_yet(asked: str, instead: str) -> str:
    """Returns the problem of an argument whose feature is planned for a later version."""
    return f"{asked} is planned for a later version of hasten and not supported yet; {instead}"
