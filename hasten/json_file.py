"""Reads JSON files that others wrote: bounded in size and depth, and nothing in them that two parsers read
differently. stdlib only.

Python's parser takes NaN, keeps the last of two equal keys, and overflows its stack on deep nesting.
"""

import json
import math
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
SHOWN = 300
"""Characters of a foreign text that a message repeats."""


class JsonError(ValueError):
    """The text is no JSON object that can be read safely. The message says what and where, without the file's name."""


def read_object(
    path: Path, raises: type[Exception], most: int = MAX_BYTES, unbounded: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the JSON object in `path`. Raises `raises`, which names the file, for anything else.

    Refused: more than `most` bytes, text that is not UTF-8 (or begins with a byte order mark), two equal keys in one
    object, nesting deeper than `MAX_DEPTH`, NaN, and infinity outside of the fields `unbounded`.
    """
    try:
        raw = read_bytes(path, most)
        found = parse_object(raw.decode("utf-8"), unbounded)
    except UnicodeDecodeError as error:
        raise raises(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it again") from error
    except OSError as error:
        raise raises(f"{path} cannot be read ({error.strerror or error}). Check the file") from error
    except JsonError as error:
        raise raises(f"{path} cannot be read: {error}. Download or save it again") from error
    return found


def read_bytes(path: Path, most: int) -> bytes:
    """Returns the content of an ordinary file. Raises JsonError for another kind of file, or more than `most` bytes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise JsonError("it is not an ordinary file")
    if found.st_size > most:
        raise JsonError(f"it has {found.st_size} bytes; at most {most} are read")
    return path.read_bytes()


def parse_object(text: str, unbounded: Collection[str] = ()) -> dict[str, Any]:
    """Returns the object that `text` holds. Raises JsonError, see `read_object`."""
    found = parse(text)
    if not isinstance(found, dict):
        raise JsonError(f"it holds {kind_of(found)}, and must hold an object of names and values")
    for place, value, depth in walk(found):
        if depth > MAX_DEPTH:
            raise JsonError(f"values are nested more than {MAX_DEPTH} deep")
        if _is_nan(value):
            raise JsonError(f"{place} is NaN, and must be a number")
        if _is_infinite(value) and not any(name in place for name in unbounded):
            raise JsonError(f"{place} is infinite or too large for a float, and must be a finite number")
    return found


def parse(text: str) -> Any:
    """Returns the value of a JSON text. Raises JsonError for equal keys, lone surrogates and what is not JSON."""
    try:
        found = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise JsonError("it has an escape of half a character (a lone surrogate)") from error
    except RecursionError as error:
        raise JsonError(f"values are nested more than {MAX_DEPTH} deep") from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"it is not readable as JSON ({shown(error)})" if text.strip() else "it is empty") from error
    return found


def walk(value: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    """Yields (place such as "text_config.rope_parameters.factor", value, depth) of everything in a parsed value,
    without recursion. Stops descending below `MAX_DEPTH`."""
    waiting = [(place, value, depth)]
    while waiting:
        place, value, depth = waiting.pop()
        yield place, value, depth
        if depth > MAX_DEPTH:
            continue
        if isinstance(value, dict):
            waiting += [(f"{place}.{name}" if place else str(name), inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{place}[{i}]", inner, depth + 1) for i, inner in enumerate(value) if not _is_plain(inner)]


def kind_of(value: Any) -> str:
    """Returns a JSON value's type in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), type(value).__name__)


def shown(value: object, most: int = SHOWN) -> str:
    """Returns a foreign value or message as printable text of one line and at most `most` characters."""
    if isinstance(value, str | BaseException):
        text = str(value)
    else:
        try:
            text = repr(value)
        except ValueError:  # an integer of more than 4,300 digits
            text = f"{type(value).__name__} of very many digits"
    text = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text[: 2 * most]).split())
    return text if len(text) <= most else f"{text[:most]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise JsonError(f"the key {shown(twice)!r} occurs twice in one object; keep one of them")
    return found


def _is_plain(value: Any) -> bool:
    """Returns whether a list's item needs no look: text, or an integer. Lists of merges and token ids are long."""
    return isinstance(value, str | int)


def _is_nan(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("__float__") == "NaN"  # as transformers spells it
    return isinstance(value, float) and math.isnan(value)


def _is_infinite(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("__float__") in ("Infinity", "-Infinity")
    return isinstance(value, float) and math.isinf(value)
