"""Suggests known names for a mistyped one. Every message of the package that does so calls this. stdlib only."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: Any, known: Iterable[Any], count: int = 3, cutoff: float = 0.6) -> str:
    """ " (did you mean a or b?)" with at most `count` of `known`, most similar first; "" where none is similar.

    cutoff: the least `difflib` ratio of a suggestion, from 0 (anything) to 1 (equal).
    """
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=count, cutoff=cutoff)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
