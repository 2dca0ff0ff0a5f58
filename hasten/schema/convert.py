"""From YAML nodes to values of the types that their keys take. What could mean two things is a problem, never a guess."""

import math
import re
from typing import Any

from hasten.schema.expected import DTYPES, Expected
from hasten.schema.yaml_file import Entries, Node, Scalar
from hasten.suggest import did_you_mean

NULL = {"", "~", "null", "Null", "NULL"}
TRUE_FALSE = {"true": True, "false": False}
YES_NO = {"yes": True, "no": False, "on": True, "off": False, "y": True, "n": False}
INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2}(_[0-9]{3})+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(r"[+-]?\.?(nan|inf|infinity)", re.IGNORECASE)
UNCLEAR = re.compile(
    r"[+-]?(0[0-9_]+|0[xob][0-9a-f_]+|[0-9][0-9_]*_[0-9_]*|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)", re.I
)
"""What YAML 1.1 takes for octal, hexadecimal, sexagesimal and underscored numbers, and YAML 1.2 does not."""
MAX_DIGITS = 18
"""Of an integer: more do not fit into 64 bits."""
SHOWN = 60
"""Characters of a value that a message shows."""
FAILED = object()
"""In place of a value that has a problem."""


def convert(node: Node, expected: Expected, where: str, problems: list[str]) -> Any:
    """The value of `node` as `expected` takes it. Adds what is wrong to `problems`, by the name `where`, and returns FAILED then."""
    if isinstance(node, Scalar):
        return _scalar(node, expected, where, problems)
    if expected.anything:
        return _generic(node, where, problems)
    if isinstance(node, Entries) and expected.values is not None:
        pairs = [(key.text, convert(n, expected.values, f"{where}.{key.text}", problems)) for key, n in node.pairs]
        return _unless_failed(dict(pairs), [value for _, value in pairs])
    if isinstance(node, tuple) and expected.items is not None:
        items = [convert(n, expected.items, f"{where}[{number}]", problems) for number, n in enumerate(node)]
        return _unless_failed(items, items)
    return _wrong(node, expected, where, problems)


def found(node: Node) -> str:
    """What a node is, for messages: its text and its type."""
    if isinstance(node, Entries):
        return _short(f"a mapping of {', '.join(node.names())}") if node.pairs else "an empty mapping"
    if isinstance(node, tuple):
        return f"a list of {len(node)}"
    if node.quoted:
        return f"{_short(repr(node.text))} (text in quotes)"
    if node.text in NULL:
        return f"{node.text or 'nothing'} (null)"
    if node.text.lower() in TRUE_FALSE | YES_NO:
        kind = "a truth value"
    elif INTEGER.fullmatch(node.text) or GROUPED.fullmatch(node.text):
        kind = "an integer"
    elif NUMBER.fullmatch(node.text) or NOT_FINITE.fullmatch(node.text):
        kind = "a number"
    else:
        return f"{_short(repr(node.text))} (text)"
    return f"{_short(node.text)} ({kind})"


def number(text: str) -> int | float | None:
    """The number that a plain scalar spells, whole ones as int; None for everything that is not one, or not finite."""
    if INTEGER.fullmatch(text) or GROUPED.fullmatch(text):
        return int(text.replace("_", "")) if len(text) <= MAX_DIGITS else None
    if UNCLEAR.fullmatch(text) or not NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _scalar(node: Scalar, expected: Expected, where: str, problems: list[str]) -> Any:
    if expected.anything:
        return _generic(node, where, problems)
    value = _quoted(node.text, expected) if node.quoted else _plain(node.text, expected)
    if value is FAILED:
        return _wrong(node, expected, where, problems)
    if expected.choices and isinstance(value, str) and not expected.takes_text and value not in expected.choices:
        if any("[" in str(choice) for choice in expected.choices):
            return value  # a choice with a placeholder, such as pissa_niter_[number of iters]
        hint = did_you_mean(value, expected.choices)
        problems.append(f"{where}: found {found(node)}, must be {expected}{hint}")
        return FAILED
    return value


def _plain(text: str, expected: Expected) -> Any:
    if text in NULL:
        return None if "none" in expected.scalars else FAILED
    lower = text.lower()
    if lower == "none" and "none" in expected.scalars and text not in expected.choices and not expected.choices:
        return FAILED if text == "None" or not expected.takes_text else text
    if expected.takes_bool and lower in TRUE_FALSE:
        return TRUE_FALSE[lower]
    if expected.takes_bool and lower in YES_NO:
        return FAILED if expected.takes_text else YES_NO[lower]
    numeric = expected.scalars & {"int", "float"}
    if numeric and (value := number(text)) is not None:
        if "float" in numeric or isinstance(value, int):
            return value
        return int(value) if value.is_integer() else FAILED
    if numeric and NOT_FINITE.fullmatch(text):
        return FAILED
    return _text(text, expected)


def _quoted(text: str, expected: Expected) -> Any:
    if expected.takes_bool and text.lower() in TRUE_FALSE | YES_NO:
        return FAILED
    return _text(text, expected)


def _text(text: str, expected: Expected) -> Any:
    if "dtype" in expected.scalars:
        return text.removeprefix("torch.") if text.removeprefix("torch.") in DTYPES else FAILED
    return text if expected.takes_text or any(isinstance(choice, str) for choice in expected.choices) else FAILED


def _generic(node: Node, where: str, problems: list[str]) -> Any:
    """A value whose key says nothing about its type: the reading on which YAML 1.1, YAML 1.2 and JSON agree."""
    if isinstance(node, Entries):
        pairs = [(_key(key), _generic(inner, f"{where}.{key.text}", problems)) for key, inner in node.pairs]
        return _unless_failed(dict(pairs), [value for _, value in pairs])
    if isinstance(node, tuple):
        items = [_generic(inner, f"{where}[{index}]", problems) for index, inner in enumerate(node)]
        return _unless_failed(items, items)
    text, lower = node.text, node.text.lower()
    if node.quoted:
        if lower in TRUE_FALSE or number(text) is not None:
            problems.append(f"{where}: found {found(node)}; leave out the quotes")
            return FAILED
        return text
    if text in NULL:
        return None
    if lower in TRUE_FALSE:
        return TRUE_FALSE[lower]
    if (value := number(text)) is not None:
        return value
    if lower in YES_NO or text == "None" or UNCLEAR.fullmatch(text) or NOT_FINITE.fullmatch(text):
        problems.append(
            f"{where}: found {found(node)}, which can be read in two ways; write true, false, null or a decimal number, or put "
            "text in quotes"
        )
        return FAILED
    return text


def _key(key: Scalar) -> str | int:
    """Keys such as those of max_memory are GPU numbers."""
    return int(key.text) if not key.quoted and INTEGER.fullmatch(key.text) else key.text


def _wrong(node: Node, expected: Expected, where: str, problems: list[str]) -> Any:
    problems.append(f"{where}: found {found(node)}, must be {expected}{_advice(node, expected)}")
    return FAILED


def _advice(node: Node, expected: Expected) -> str:
    numeric = bool(expected.scalars & {"int", "float"})
    if isinstance(node, Scalar):
        text, lower = node.text, node.text.lower()
        if node.quoted and (
            (expected.takes_bool and lower in TRUE_FALSE | YES_NO) or (numeric and number(text) is not None)
        ):
            return "; leave out the quotes"
        if text == "None":
            return "; write null, or leave the key out"
        if expected.takes_bool and lower in YES_NO:
            return f"; write {str(YES_NO[lower]).lower()}, or put text in quotes"
        if numeric and UNCLEAR.fullmatch(text):
            return "; YAML reads it as another number, write it in decimal digits"
        if numeric and NOT_FINITE.fullmatch(text):
            return ", and finite"
        if numeric and len(text) > MAX_DIGITS:
            return f" of at most {MAX_DIGITS} digits"
        if expected.items is not None and not expected.takes_text and text not in NULL:
            return f"; write [{text}]"
    return ""


def _unless_failed(whole: Any, parts: list[Any]) -> Any:
    return FAILED if any(part is FAILED for part in parts) else whole


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
