"""Suggests known names for a mistyped one, for all messages of the package. stdlib only."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: Any, known: Iterable[Any], count: int = 3, cutoff: float = 0.6) -> str:
    """Returns " (did you mean a or b?)" with at most `count` of `known`, most similar first; "" if none is similar.

    cutoff: the least `difflib` ratio of a suggestion, from 0 (anything) to 1 (equal).
    """
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=count, cutoff=cutoff)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
