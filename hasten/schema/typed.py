"""Checks the Python values of a call against what their arguments take."""

import math
from collections.abc import Mapping
from typing import Any

from hasten.schema.expected import Expected


def mistyped(values: Mapping[str, Any], fields: Mapping[str, Expected]) -> dict[str, str]:
    """{argument: problem} for each of `values` whose type its field does not take: text such as "false" for a bool above all,
    which Python takes for true. Objects of other libraries (enumerations, configs, dtypes) are left to those."""
    found = {}
    for name, value in values.items():
        expected = fields.get(name)
        if expected is not None and not expected.anything and not _fits(value, expected):
            found[name] = f"{name}={value!r}: found {type(value).__name__}, must be {expected}"
    return found


def _fits(value: Any, expected: Expected) -> bool:
    if expected.anything:
        return True
    if value is None:
        return "none" in expected.scalars
    if isinstance(value, bool):
        return expected.takes_bool
    if isinstance(value, int):
        return bool(expected.scalars & {"int", "float"})
    if isinstance(value, float):
        return "float" in expected.scalars and math.isfinite(value)
    if isinstance(value, str):
        return expected.takes_text or any(isinstance(choice, str) for choice in expected.choices)
    if isinstance(value, Mapping):
        return expected.values is not None and all(_fits(one, expected.values) for one in value.values())
    if not isinstance(value, list | tuple | set | frozenset):
        return True
    return expected.items is not None and all(_fits(one, expected.items) for one in value)


def text_for_other(values: Mapping[str, Any], fields: Mapping[str, Expected]) -> list[str]:
    """As the problems of `mistyped`, for text in place of something else alone."""
    texts = {n: v for n, v in values.items() if isinstance(v, str)}
    return list(mistyped(texts, fields).values())
