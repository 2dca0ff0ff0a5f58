"""Rules for the value of one argument, and sentences that several checks share."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Rule: TypeAlias = Callable[[Any], str | None]
"""value -> None if it is valid, else what it must be."""


def is_integer(value: Any, least: int) -> bool:
    """Returns whether `value` is an int of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive_integer(value: Any) -> str | None:
    """Returns the rule for counts and ranks."""
    return None if is_integer(value, 1) else "must be a positive integer"


def seed(value: Any) -> str | None:
    """Returns the rule for `random_state`."""
    return None if is_integer(value, 0) else "must be an integer of at least 0"


def broken_rules(options: object, rules: Mapping[str, Rule]) -> dict[str, str]:
    """Returns {argument: problem} for each argument of `options` whose value breaks its rule."""
    found = {}
    for name, rule in rules.items():
        value = getattr(options, name)
        if (problem := rule(value)) is not None:
            found[name] = f"{name}={value!r}: {problem}"
    return found


def not_yet(asked: str, instead: str) -> str:
    """Returns the problem with an argument whose feature comes in a later version."""
    return f"{asked} comes in a later version of hasten and is not supported yet; {instead}"
