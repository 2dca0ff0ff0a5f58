"""The comparison of loss curves can tell a library that trains otherwise, and runs."""

import json
from pathlib import Path

import pytest

from benchmarks import curves, gpu
from benchmarks.curves import comments, docstrings, train_tokenizer

STOCK = [[4.0 - 0.1 * step + 0.2 * seed for step in range(10)] for seed in range(3)]


def test_the_same_curves_are_inside() -> None:
    one = curves.summarise(STOCK, STOCK, 2)
    assert one["inside"] == 1.0 and one["sigmas"] == pytest.approx(0) and one["paired"] == 0
    assert one["low"][0] == pytest.approx(3.95) and one["high"][0] == pytest.approx(4.35) and len(one["mean"]) == 9
    assert one["final_stock"] == pytest.approx(3.35)


def test_curves_that_leave_the_spread_are_told() -> None:
    late = [[value + (0.5 if step >= 5 else 0.0) for step, value in enumerate(run)] for run in STOCK]
    one = curves.summarise(STOCK, late, 1)
    assert one["inside"] == 0.5 and one["paired"] == pytest.approx(0.5)
    assert one["sigmas"] == pytest.approx(0.5 / 0.2) and one["final_hasten"] == pytest.approx(one["final_stock"] + 0.5)


def test_text_is_real_and_always_the_same() -> None:
    said, other = docstrings(40), comments(40)
    assert said == docstrings(40) and len(said) > 20_000 and len(other) > 20_000
    assert " the " in said and " the " in other and said != other
    tokenizer = train_tokenizer(said, 400)
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.decode(tokenizer.encode(said[:500]).ids) == said[:500]


def test_both_stages_of_both_libraries_learn_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = curves.Setting(
        layers=2, width=64, words=400, batch=2, length=32, steps=12, seeds=2, files=15, smooth=3, processes=1
    )
    monkeypatch.setattr(curves, "Setting", lambda: setting)
    assert gpu.main(["--out", str(tmp_path), "--only", "curves"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["curves"]
    for stage in curves.STAGES:
        assert found[stage]["paired"] < 0.02, "one seed, bf16, CPU: the same steps up to rounding"
        assert found[stage]["inside"] > 0.5 and len(found[stage]["mean"]) == 10
    assert found["full"]["mean"][-1] < found["full"]["mean"][0] - 0.02
    assert found["text"]["full"]["tokens"] > 1000
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("curves, ")]
    assert len(printed) == 2 and f"paired {found['full']['paired']:.5g}" in printed[0]
