"""What `make test` keeps of a grid: every value, or every pair of values, whatever the grid's shape; the rest is `full`."""

from itertools import combinations, product

import pytest
from tiers import cover

pytest_plugins = ["pytester"]

AXES = [range(2), range(3), "abcdefg", (True, False)]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_is_covered_by_few_cases(strength: int) -> None:
    cases = list(product(*AXES))
    taken = cover(cases, strength)
    for axes in combinations(range(len(AXES)), strength):
        wanted = {tuple(case[i] for i in axes) for case in cases}
        assert {tuple(cases[one][i] for i in axes) for one in taken} == wanted
    assert len(taken) <= {1: 7, 2: 24, 3: 60}[strength] < len(cases)  # no fewer than 7, 21 and 42 can do
    assert taken == cover(cases, strength)


def test_a_short_axis_alternates_along_a_long_one() -> None:
    cases = list(product(range(6), "xyz"))
    assert sorted(cases[i][1] for i in cover(cases, 1)) == list("xxyyzz")


def test_combinations_that_no_case_has_are_not_asked_for() -> None:
    cases = [("sdpa", "llama"), ("eager", "llama"), ("eager", "gemma2")]
    assert cover(cases, 2) == {0, 1, 2}
    assert cover(cases, 1) == {0, 2}


GRID = """
import pytest

@pytest.mark.grid(1)
@pytest.mark.parametrize(("one", "word"), [(1, "a"), (2, "a"), (3, "b")])
@pytest.mark.parametrize("other", [True, False])
def test_a_grid(one, word, other): ...

@pytest.mark.parametrize("one", [1, 2])
def test_no_grid(one): ...
"""
CONFTEST = """
import pytest
from tiers import mark_full

def pytest_configure(config):
    config.addinivalue_line("markers", "grid(strength)")
    config.addinivalue_line("markers", "full")

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    mark_full(items)
"""


def test_the_two_tiers_are_the_suite(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(GRID)
    for tier, passed in (("not full", 3 + 2), ("full", 3)):
        pytester.runpytest("-m", tier).assert_outcomes(passed=passed, deselected=8 - passed)


def test_a_case_that_is_named_runs(pytester: pytest.Pytester) -> None:
    """Naming one is how a failure of the other tier is looked into; its cover is itself."""
    pytester.makeconftest(CONFTEST)
    path = pytester.makepyfile(GRID)
    for case in ("True-1-a", "True-2-a", "False-3-b"):
        pytester.runpytest("-m", "not full", f"{path}::test_a_grid[{case}]").assert_outcomes(passed=1)
