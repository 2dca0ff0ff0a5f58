"""docs/guarantees.md is current, and every guarantee has a test with a sentence for users."""

from guarantee_page import NUMBERS, PAGE, guarantees, render


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python tests/guarantees/guarantee_page.py"


def test_every_guarantee_has_a_test_that_runs_without_a_gpu() -> None:
    assert {one.number for one in guarantees() if not one.where} == set(NUMBERS)


def test_every_test_says_what_it_guarantees() -> None:
    for one in guarantees():
        assert one.sentence.endswith(".") and 30 < len(one.sentence) < 220, one.test
