"""The longest row under a cap: what is run, what running out of memory leaves behind, and what is made of the rows."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_kit import longest_row

from benchmarks import gpu, longest
from benchmarks.harness import results
from benchmarks.harness.card import Card
from benchmarks.harness.checkpoints import checkpoint, with_positions
from benchmarks.harness.steps import Steps


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("points")


@pytest.fixture(scope="module")
def steps(points: Path) -> Steps:
    found = longest.load("hasten", longest.job_of("tiny", 4096), points)
    longest.warm(found)
    return found


@pytest.mark.full
def test_points_and_a_series_on_a_cpu(tmp_path: Path, points: Path) -> None:
    """One process, one model, every row in the order given; more positions than the shape's own config has."""
    more = ["--variants", "hasten", "--shape", "tiny", "--points", "1:64,2:4096", "--series", "64,128,256"]
    assert gpu.main(["--out", str(tmp_path), "--checkpoints", str(points), "--only", "longest", *more]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    rows = written["longest"]
    told = [(row["cap_gib"], row["length"]) for row in rows]
    assert told == [(1.0, 64), (2.0, 4096), (None, 64), (None, 128), (None, 256)]
    assert all(row["ok"] and row["seconds"] > 0 and 5 < row["loss"] < 8 for row in rows)
    assert all("CPU memory" in row["plan"] for row in rows[2:]) and "CPU memory" not in rows[0]["plan"]
    assert rows[1]["predicted_gib"] > rows[0]["predicted_gib"] > 0
    assert written["linearity"]["rows"] == 3
    later = written | {"longest": [row | {"loss": 1.0} for row in rows[:2]]}
    assert [row["loss"] == 1.0 for row in results.merge([written, later])["longest"]] == [True] * 2 + [False] * 3


def test_out_of_memory_is_a_row_and_the_next_point_runs(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = steps.loss

    def loss(ids: torch.Tensor) -> torch.Tensor:
        found = plain(ids)
        if ids.shape[1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")
        return found

    monkeypatch.setattr(steps, "loss", loss)
    failed, came = (longest.one_point(steps, Card(), (1.0, length)) for length in (96, 64))
    assert not failed["ok"] and failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    assert (
        failed["seconds"] is None
        and failed["predicted_gib"] > 0
        and {"NOT OK", "error OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"}
        <= set(results.line_of(failed).split("  "))
    )
    assert came["ok"] and came["error"] is None
    assert all(parameter.grad is None for _, parameter in steps.names)


def test_what_is_not_about_memory_is_raised(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(steps, "loss", loss)
    with pytest.raises(RuntimeError, match="illegal"):
        longest.one_point(steps, Card(), (1.0, 64))


def test_a_loss_that_is_no_number_is_not_ok(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = steps.loss
    monkeypatch.setattr(steps, "loss", lambda ids: plain(ids) * float("inf"))
    monkeypatch.setattr(steps.optimizer, "step", lambda: None)
    row = longest.one_point(steps, Card(), (1.0, 64))
    assert not row["ok"] and row["error"] == "the loss is not finite"
    steps.optimizer.zero_grad(set_to_none=True)


def test_the_cap_less_a_reserve_is_what_the_policy_is_told(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(longest, "switch", lambda steps, mode, budget: told.append((mode, budget)))
    card = Card()
    card.context = 2**20
    for cap in (2.0, None):
        longest.one_point(steps, card, (cap, 64))
    assert told == [("auto", int((2**31 - 2**20) * (1 - longest.RESERVE))), ("offload", None)]


def test_a_checkpoint_with_more_positions_shares_its_weights(points: Path) -> None:
    whole = checkpoint("tiny", points)
    assert with_positions(whole, 128) == whole
    longer = with_positions(whole, 5000)
    assert with_positions(whole, 5000) == longer != whole
    config, given = (json.loads((one / "config.json").read_text()) for one in (longer, whole))
    assert config.pop("max_position_embeddings") == 5000 and given.pop("max_position_embeddings") < 5000
    assert config == given
    assert (longer / "model.safetensors").resolve() == (whole / "model.safetensors").resolve()


def test_a_search_finds_the_last_length_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    found = [longest.search(longest.job_of("tiny", 64), cap, host_gib=1.0) for cap in (0.9, 1.2)]
    assert 0 < found[0]["length"] < found[1]["length"] and found[1]["length"] % longest.GRAIN == 0
    budget = (0.9 - longest.CONTEXT_GIB) * (1 - longest.RESERVE)
    assert budget * 0.9 < found[0]["predicted_gib"] <= budget
    assert longest.search(longest.job_of("tiny", 64), longest.CONTEXT_GIB, 1.0)["length"] == 0


def test_peaks_on_a_line_and_peaks_that_are_not() -> None:
    straight = [longest_row("hasten", None, n * 1024, peak_gib=6.0 + n / 8) for n in (8, 16, 32, 64)]
    fit = longest.linearity([*straight, longest_row("hasten", 24.0, 8192, peak_gib=99.0)])
    assert fit is not None and fit["rows"] == 4
    assert fit["gib_at_zero"] == pytest.approx(6.0) and fit["gib_per_1024"] == pytest.approx(1 / 8)
    assert fit["residual_gib"] == pytest.approx(0, abs=1e-9)
    bent = [row | {"peak_gib": 6.0 + (row["length"] / 8192) ** 2} for row in straight]
    found = longest.linearity(bent)
    assert found is not None and found["residual_gib"] > 1
    assert longest.linearity(straight[:2]) is None
    assert longest.linearity([straight[0] | {"ok": False}, *straight[1:3]]) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--points or --series"),
        (["--points", "8:64"], "one of --variants"),
        (["--variants", "hasten"], "--points or --series"),
        (["--variants", "unsloth", "--series", "64"], "pass --variants hasten"),
    ],
)
def test_too_little_is_refused(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--out", "nowhere", "--only", "longest", *given])
    assert said in capsys.readouterr().err
