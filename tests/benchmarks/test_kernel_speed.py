"""The timed kernel calls run on tiny shapes: every op's case and every subject of the tuning, with made-up times."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import ops, tune
from benchmarks.harness import timing

CEILINGS = {"copy": 4e12, "matmul": 800e12}
TINY = tune.Shape(1, 32, 2, 1, 16)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """The timed calls, each of which runs once; the n-th takes 1 / n ms."""
    found: list[Callable[[], Any]] = []

    def once(function: Callable[[], Any], **how: int) -> float:
        found.append(function)
        function()
        return 1 / len(found)

    monkeypatch.setattr(timing, "milliseconds", once)
    monkeypatch.setattr(timing, "device_ms", once)
    return found


def test_every_op_has_a_row(called: list[Any]) -> None:
    pytest.importorskip("bitsandbytes")
    rows = list(ops.measure(ops.Sizes(1, 8, 64, 64, 2, 1, 32, 40, 2, 4, 64)))
    assert len(called) == len(rows) == len({row["op"] for row in rows}) == 22
    assert all(row["bytes"] > 0 and row["flops"] > 0 for row in rows)


def test_work_of_the_8b_step_is_what_was_published() -> None:
    """Bytes and FLOP of the published rows (benchmarks/results); the times are another run's."""
    from benchmarks.harness.results import newest

    published = {row["op"]: (row["bytes"], row["flops"]) for result in newest() for row in result.get("ops", [])}
    cases = [case for kind in (ops.elementwise, ops.attentions, ops.linears) for case in kind(ops.Sizes())]
    for case in cases:
        for way, work in (("forward", case.forward), ("backward", case.backward)):
            assert published[f"{case.name}, {way}"] == pytest.approx(work), case.name


@pytest.mark.parametrize(
    "shape", [TINY, tune.Shape(1, 32, 2, 1, 16, window=8), tune.Shape(2, 32, 2, 2, 16, documents=4)]
)
def test_tiles_agree_and_the_fastest_comes_first(
    shape: tune.Shape, called: list[Any], monkeypatch: pytest.MonkeyPatch, kernels: None
) -> None:
    monkeypatch.setitem(tune.SHAPES, "8b", shape)
    monkeypatch.setitem(tune.TILES, 16, dict.fromkeys(("fwd", "dkdv", "dq"), [(32, 16, 4, 1)]))
    choices = list(tune.attention("8b", False))
    assert [choice.title for choice in choices] == [f"attention 8b, {name}" for name in ("fwd", "dkdv", "dq")]
    for choice in choices:
        rows = tune.measure(choice, CEILINGS)
        assert len(rows) == 2 and rows[0]["ms"] < rows[1]["ms"]


@pytest.mark.parametrize("subject", ["head", "nf4"])
def test_other_kernels_run_with_every_launch(
    subject: str, called: list[Any], capsys: pytest.CaptureFixture[str], kernels: None
) -> None:
    pytest.importorskip("bitsandbytes")
    for choice in tune.SUBJECTS[subject](True):
        assert len(tune.measure(choice, CEILINGS)) == len(choice.calls)
        assert choice.title in capsys.readouterr().out


def test_a_launch_that_differs_stops_and_one_that_does_not_fit_is_told(
    called: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def unfit() -> Any:
        raise RuntimeError("out of resource: shared memory")

    one = timing.draw(4)
    rows = tune.measure(tune.Choice("c", {"a": lambda: one, "b": unfit}, 1.0), CEILINGS)
    assert [row["op"] for row in rows] == ["a"] and "b: out of resource" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="b differs"):
        tune.measure(tune.Choice("c", {"a": lambda: one, "b": lambda: one * 1.1}, 1.0), CEILINGS)


def test_a_launch_that_does_not_fit_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("out of resource")

    def breaks() -> Any:
        raise AttributeError("a mistake of ours")

    calls: dict[str, Any] = {"a": fails, "b": breaks}
    monkeypatch.setitem(tune.SUBJECTS, "head", lambda small: [tune.Choice("c", calls, 1.0)])
    tune.compile_one("head", 0)
    with pytest.raises(AttributeError):
        tune.compile_one("head", 1)
