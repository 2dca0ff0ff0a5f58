"""Amounts of memory as people write and read them. stdlib only."""

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
GIB = 2**30


def parse_bytes(amount: int | str) -> int:
    """Bytes of "5GB", "200 MB", "1GiB" or a number of bytes. Raises ValueError for anything else and for less than one byte."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(amount))
    if found is None or found[2].upper() not in UNITS or float(found[1]) * UNITS[found[2].upper()] < 1:
        raise ValueError(f'{amount!r} is no size; write it as "5GB", "24GiB" or a number of bytes')
    return int(float(found[1]) * UNITS[found[2].upper()])


def format_bytes(count: int) -> str:
    """`count` bytes in GiB from one on, else in MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
