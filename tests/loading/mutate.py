"""Mutates JSON files and safetensors headers, from a seed."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, "", "8", "false", "x" * 50, "[/bold]", -1, 0, 1, 3, 7, -64, 10**6, 2**31, 2**63, 10**30,
    0.5, -0.5, 1e-300, float("nan"), float("inf"), [], {}, [1, "a", None], {"a": {"b": []}},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value inside of `value`, at most twenty of one object or list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner)[:60]:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated_json(text: str, chance: random.Random) -> bytes:
    """Returns a JSON text with one fault: in a value three times of four, else in the text itself."""
    if chance.random() < 0.75:
        content = copy.deepcopy(json.loads(text))
        *parents, last = chance.choice(list(places(content)))
        holder = content
        for key in parents:
            holder = holder[key]
        how = chance.random()
        if how < 0.15:
            del holder[last]
        elif how < 0.25 and isinstance(last, str):
            holder[chance.choice(("to_dict", f"{last}2", "__class__", last.upper()))] = holder.pop(last)
        else:
            holder[last] = chance.choice(VALUES)
        return json.dumps(content).encode()
    raw = text.encode()
    spot = chance.randrange(len(raw))
    inner = raw[raw.index(b"{") + 1 :]
    return chance.choice(
        (
            b"", b"\xef\xbb\xbf" + raw, b"[" + raw + b"]", b"null", raw[:spot], raw[:spot] + b"\xff" + raw[spot:],
            raw[:spot] + bytes([raw[spot] ^ (1 << chance.randrange(7))]) + raw[spot + 1 :],
            b'{"deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"," + inner,
            b'{"model_type": "gpt2", "hidden_size": 1,' + inner, b'{"vocab_size": 1e999,' + inner,
            b'{"x": ' + b"9" * 5000 + b"," + inner, b'{"x": "\\ud800",' + inner,
        )
    )  # fmt: skip


def mutated_safetensors(raw: bytes, chance: random.Random) -> bytes:
    """Returns a safetensors file with one fault: in the header's JSON, its length, or the file's size."""
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = raw[8 : 8 + length].decode(), raw[8 + length :]
    how = chance.random()
    if how < 0.1:
        return struct.pack("<Q", chance.choice((0, 1, length + 8, 2**40, 2**63))) + raw[8:]
    if how < 0.2:
        return raw[: chance.randrange(len(raw))]
    made = mutated_json(header, chance)
    return struct.pack("<Q", len(made)) + made + data
