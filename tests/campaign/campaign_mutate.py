"""Changes to files, drawn from a seed: in a JSON document, in its text, and in safetensors files."""

import copy
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**6, 10**18, -0.5, 0.3, 1e-300, 1e308, math.nan, math.inf, "", "x", "1", "-1", "true",
    "no", "1e-5", "../..", "[bold]", [], {}, [1], ["x"], {"x": 1}, [None], [[0]], "é" * 3,
)  # fmt: skip


def paths(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a document, the first 40 entries of each container."""
    found = [here] if here else []
    if isinstance(document, dict):
        entries: Any = list(document.items())[:40]
    elif isinstance(document, list):
        entries = list(enumerate(document))[:40]
    else:
        return found
    for name, value in entries:
        found += paths(value, (*here, name))
    return found


def change_json(document: Any, rng: random.Random) -> tuple[Any, str, tuple[Any, ...], Any]:
    """(changed copy, what was done, path, new value). A path at the top is chosen more often than one deep inside."""
    changed = copy.deepcopy(document)
    every = paths(changed)
    shallow = [path for path in every if len(path) <= 2]
    path = rng.choice(shallow if shallow and rng.random() < 0.7 else every)
    holder = changed
    for name in path[:-1]:
        holder = holder[name]
    last, old = path[-1], holder[path[-1]]
    how = rng.choice(("value", "value", "value", "remove", "type", "rename", "scale", "swap"))
    new: Any = rng.choice(VALUES)
    if how == "remove":
        del holder[last]
        return changed, f"{_dotted(path)} removed", path, None
    if how == "rename" and isinstance(holder, dict):
        other = rng.choice((f"{last}s", str(last)[:-1] or "x", str(last).upper(), f" {last}", "x"))
        holder[other] = holder.pop(last)
        return changed, f"{_dotted(path)} renamed to {other!r}", path, None
    if how == "type":
        new = {str: [old], bool: str(old).lower(), int: str(old), float: str(old), list: {"0": old}, dict: [old]}.get(
            type(old), ""
        )
    elif how == "scale" and isinstance(old, int | float) and not isinstance(old, bool):
        new = rng.choice((old * 2, old + 1, -old, old / 2, float(old)))
    elif how == "swap":
        source = document
        for name in rng.choice(every):
            source = source[name]
        new = copy.deepcopy(source)
    holder[last] = new
    return changed, f"{_dotted(path)}: {_short(old)} -> {_short(new)}", path, new


def change_text(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file as bytes: cut, damaged, in another encoding, or nested too deeply."""
    at = rng.randrange(max(1, len(raw)))
    changes: dict[str, Callable[[], bytes]] = {
        f"cut at byte {at}": lambda: raw[:at],
        f"byte {at} flipped": lambda: raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :],
        f"bytes inserted at {at}": lambda: raw[:at] + rng.randbytes(5) + raw[at:],
        "a byte order mark": lambda: b"\xef\xbb\xbf" + raw,
        "UTF-16": lambda: raw.decode("utf-8").encode("utf-16"),
        "empty": lambda: b"",
        "only null": lambda: b"null",
        "a list": lambda: b"[" + raw + b"]",
        "nested 200,000 deep": lambda: b"[" * 200_000,
        "twice": lambda: raw + raw,
        "zeros": lambda: bytes(len(raw)),
    }
    what = rng.choice(list(changes))
    return changes[what](), what


def change_json_file(path: Path, rng: random.Random) -> str:
    """Rewrites a JSON file: mostly a value in it, sometimes its text."""
    if rng.random() < 0.25:
        raw, what = change_text(path.read_bytes(), rng)
        path.write_bytes(raw)
        return f"{path.name}: {what}"
    document = json.loads(path.read_text(encoding="utf-8"))
    changed, what, *_ = change_json(document, rng)
    path.write_text(json.dumps(changed), encoding="utf-8")
    return f"{path.name}: {what}"


def change_safetensors(path: Path, rng: random.Random) -> tuple[str, bool]:
    """(what was done, whether the values of a tensor are damaged so that they must not pass as they are)."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    how = rng.choice(
        ("header", "header", "field", "field", "text", "length", "data", "not finite", "name", "drop", "cut")
    )
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    what, damaged = f"{path.name}: ", how in ("name", "drop", "not finite")
    if how == "header":
        header, done, *_ = change_json(header, rng)
        what += f"header: {done}"
    elif how == "field":
        fields = (
            ("dtype", rng.choice(("F16", "BF16", "I32", "F64", "F8_E4M3", "X", 3))),
            (
                "shape",
                rng.choice(([], [1], entry["shape"][::-1], [*entry["shape"], 1], [-1, 4], [10**12], [2.5], ["8"])),
            ),
            (
                "data_offsets",
                rng.choice(([0, 4], [-4, 0], entry["data_offsets"][::-1], [0, 10**15], ["0", 4], [1.5, 4])),
            ),
        )
        field, value = rng.choice(fields)
        entry[field] = value
        what += f"{name}: {field} = {value}"
        damaged = True
    elif how == "name":
        header[f"{name}x"] = header.pop(name)
        what += f"{name} renamed"
    elif how == "drop":
        del header[name]
        what += f"{name} not listed"
    elif how == "text":
        text, done = change_text(raw[8 : 8 + length], rng)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return f"{what}header: {done}", False
    elif how == "length":
        wrong = rng.choice((0, 1, length - 1, length + 1, 2**63, 10**8 + 1, len(raw)))
        path.write_bytes(struct.pack("<Q", wrong) + raw[8:])
        return f"{what}header length {length} -> {wrong}", False
    elif how == "cut":
        at = rng.randrange(len(raw))
        path.write_bytes(raw[:at])
        return f"{what}cut at byte {at}", False
    else:
        start, end = entry["data_offsets"]
        at = start + 4 * rng.randrange(max(1, (end - start) // 4))
        bad = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf)))
        new = bad if how == "not finite" else rng.randbytes(4)
        data = data[:at] + new + data[at + 4 :]
        what += f"{name}: {'not finite' if how == 'not finite' else 'other values'} at {at}"
        damaged = damaged or not math.isfinite(struct.unpack("<f", new)[0])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return what, damaged


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))[:80]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
