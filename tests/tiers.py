"""The tiers of the suite: `make test` runs a covering part of each grid, `make test-full` runs the rest (marker `full`)."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations, groupby

import pytest

Case = Sequence[Hashable]


def cover(cases: Sequence[Case], strength: int) -> set[int]:
    """Indices of cases in which every combination of `strength` values occurs that occurs in any case.

    Greedy and deterministic: takes the case with the most new combinations; on a tie the one whose values were taken least, so
    that the values of a short axis alternate along a long one.
    """
    rest = [{tuple((i, case[i]) for i in axes) for axes in combinations(range(len(case)), strength)} for case in cases]
    used: Counter[tuple[int, Hashable]] = Counter()
    taken: set[int] = set()
    while best := max(rest, key=len, default=None):
        ties = [i for i, new in enumerate(rest) if len(new) == len(best)]
        chosen = min(ties, key=lambda i: sum(used[pair] for pair in enumerate(cases[i])))
        taken.add(chosen)
        used.update(enumerate(cases[chosen]))
        covered = rest[chosen]
        rest = [new - covered for new in rest]
    return taken


def mark_full(items: Sequence[pytest.Item]) -> None:
    """Mark as `full` the cases of tests under `grid` that are not in the cover. Arguments are the axes, told apart by repr."""
    functions = [i for i in items if isinstance(i, pytest.Function) and i.get_closest_marker("grid")]
    for _, group in groupby(functions, key=lambda item: (item.path, item.cls, item.originalname)):
        tests = list(group)
        marker = tests[0].get_closest_marker("grid")
        assert marker is not None
        cases = [tuple(map(repr, test.callspec.params.values())) for test in tests]
        taken = cover(cases, *marker.args)
        for index, test in enumerate(tests):
            if index not in taken:
                test.add_marker("full")
