"""Looks at a file of JSON rows before `datasets` parses it, which keeps the last of two equal keys in a nested object,
and does not say in which line a file is broken."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hasten.errors import DatasetError
from hasten.json_file import JsonError, parse

LONGEST = 64 * 2**20
"""The most bytes of one line."""


def check_json(path: str) -> None:
    """Raises DatasetError that names file and line for a row that is no object, has two equal keys, or is not JSON.

    A file is rows, one a line, or one JSON value (a list of rows, or an object with a column of rows).
    """
    file = Path(path)
    with file.open("rb") as opened:
        first = opened.readline(LONGEST).removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith(b"[") or not _is_object(first):
        try:
            parse(file.read_bytes().decode("utf-8-sig"))
            return
        except (JsonError, UnicodeDecodeError) as error:
            if first.startswith(b"[") or first == b"{":
                raise DatasetError(f"{path}: {error}. Correct the file") from error
    for number, line in _lines(file):
        try:
            row = parse(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (JsonError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}, line {number}: {error}. Correct or remove the line") from error
        if not isinstance(row, dict):
            raise DatasetError(f'{path}, line {number}: a row must be an object of columns, such as {{"text": ...}}')


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse(line.decode("utf-8")), dict)
    except (JsonError, UnicodeDecodeError):
        return False


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(LONGEST), b""), 1):
            if line.strip():
                yield number, line
