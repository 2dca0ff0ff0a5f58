"""The measurement of packing: the same rows in every way, losses that agree, figures only where they do."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, packing
from benchmarks.harness import results
from benchmarks.packing import WAYS, Setting

SMALL = Setting(shape="tiny", median=30.0, longest=120, rows=12, batch=4, steps=2, rounds=2)


def test_lengths_are_those_that_are_stated() -> None:
    setting = Setting(shape="tiny", rows=4000, steps=1)
    found = packing.describe(packing.draw_steps(setting))
    assert found["rows"] == 4000 and found["max"] <= 1024
    assert abs(found["p50"] - setting.median) < 0.05 * setting.median
    assert abs(found["mean"] - setting.median * 2.718281828 ** (setting.sigma**2 / 2)) < 0.05 * found["mean"]
    assert packing.draw_steps(SMALL) == packing.draw_steps(SMALL)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_holds_every_token_once(way: str) -> None:
    rows = packing.draw_steps(SMALL)[0]
    made = packing.batches(rows, way, SMALL)
    tokens = torch.cat([b["input_ids"][b["attention_mask"].bool() if way == "padded" else ...].flatten() for b in made])
    wanted = torch.tensor([token for row in rows for token in row["input_ids"]])
    assert torch.equal(tokens.sort().values.cpu(), wanted.sort().values)
    learned = sum(int((b["labels"][:, 1:] != -100).sum()) for b in made)
    assert learned == sum(len(row["input_ids"]) - 1 for row in rows)
    if WAYS[way][1] is None:
        assert len(made) == SMALL.rows // SMALL.batch
    assert ("attention_mask" in made[0]) == (way == "padded")


def test_the_whole_measurement_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "Setting", lambda: SMALL)
    more = ["--checkpoints", str(tmp_path / "points"), "--only", "packing"]
    code = gpu.main(["--out", str(tmp_path / "out"), *more])
    written = json.loads((tmp_path / "out/results.json").read_text())
    found = written["packing"]
    assert code == 0 and [row["way"] for row in found["ways"]] == list(WAYS)
    for row in found["ways"]:
        assert row["loss_off"] < packing.PARITY and row["gradient_norm_off"] < 0.05
        assert row["ms"] > 0 and row["tokens_per_s"] > 0
        assert (row["computed_tokens"] > found["real_tokens"]) == (row["way"] == "padded")
    merged = results.merge([{"date": written["date"], "versions": written["versions"]}, written])
    assert merged["packing"] == found
    printed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [f"way {way}" for way in WAYS]


def test_a_way_whose_loss_is_off_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = packing.batches

    def mixed(rows: packing.Rows, way: str, setting: Setting) -> list[packing.Batch]:
        made = plain(rows, way, setting)
        if way == "packed-16384":
            for batch in made:
                batch["labels"] = batch["labels"].roll(3)
        return made

    monkeypatch.setattr(packing, "batches", mixed)
    found = packing.measure(SMALL, tmp_path)
    told = {row["way"]: "ms" in row for row in found["ways"]}
    assert told == {way: way != "packed-16384" for way in WAYS}
    assert ["NOT OK" in results.line_of(row) for row in found["ways"]] == [way == "packed-16384" for way in WAYS]
