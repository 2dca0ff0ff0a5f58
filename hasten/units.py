"""Converts bytes to and from text such as "24GiB". stdlib only."""

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
GIB = 2**30


def parse_bytes(amount: int | str) -> int:
    """Parses a size such as "5GB" (10^9), "1GiB" (2^30) or 1024. Raises ValueError for anything else, and
    below 1 byte."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(amount))
    if found is None or found[2].upper() not in UNITS or float(found[1]) * UNITS[found[2].upper()] < 1:
        raise ValueError(f'{amount!r} must be a size such as "5GB", "24GiB" or a number of bytes')
    return int(float(found[1]) * UNITS[found[2].upper()])


def format_bytes(count: int) -> str:
    """Formats `count` bytes as text: in GiB from 1 GiB on, else in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
