"""The campaign itself: its pool tells every kind of end apart, its seeds repeat, a sample of its cases is clean, its page is current."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign_mutate import change_json, change_safetensors, change_text
from campaign_page import FIGURES, PAGE, render
from campaign_pool import BAD, Case, run_all

from hasten.errors import CheckpointError
from hasten.testing import save_tiny

HERE = Path(__file__).parent


def ends(seed: int, scratch: Path) -> tuple[str, str, str]:
    """A case that ends in each way in turn."""
    (scratch / "what.txt").write_text(f"way {seed}")
    if seed == 0:
        raise CheckpointError("no")
    if seed == 1:
        raise KeyError("raw")
    if seed == 2:
        time.sleep(60)
    if seed == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 4:
        raise SystemExit(0)
    return "no effect", "way 5", ""


def test_every_kind_of_end_is_told_apart() -> None:
    results = list(run_all([Case("ends", seed, 2.0) for seed in range(6)], lambda _: ends))
    found = {result.key: result.outcome for result in results}
    wanted = ("refused", "raw exception", "hang", "crash", "raw exception", "no effect")
    assert found == {f"ends/{seed}": outcome for seed, outcome in enumerate(wanted)}
    assert {result.what for result in results} == {f"way {seed}" for seed in range(6)}


def test_seeds_repeat_and_differ(tmp_path: Path) -> None:
    document = {"a": 1, "b": {"c": [1.5, "x"]}, "d": None}
    done = [change_json(document, random.Random(seed))[1] for seed in (*range(40), *range(40))]
    assert done[:40] == done[40:] and len(set(done)) > 15
    assert change_text(b"some text", random.Random(3)) == change_text(b"some text", random.Random(3))
    path = save_tiny(tmp_path, "llama", num_hidden_layers=1) / "model.safetensors"
    whole = path.read_bytes()
    for seed in range(30):
        seen = []
        for _ in range(2):
            path.write_bytes(whole)
            seen.append((change_safetensors(path, random.Random(seed)), path.read_bytes()))
        assert seen[0] == seen[1] and seen[0][1] != whole, seen[0][0]


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        pytest.param("config,weights,tokenizer,adapter,job", 2, id="files", marks=pytest.mark.full),
        pytest.param("kill: merge,kill: export 4-bit,kill: export adapter", 1, id="exports", marks=pytest.mark.full),
        pytest.param("config,weights,tokenizer,adapter,job", 20, id="more files", marks=pytest.mark.full),
        pytest.param("kill: training", 3, id="training", marks=pytest.mark.full),
    ],
)
def test_a_sample_is_clean(groups: str, count: int, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(HERE),
        "--groups",
        groups,
        "--only",
        str(count),
        "--out",
        str(tmp_path),
        "--workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    bad = [f"{one['key']} {one['outcome']}: {one['what']}: {one['detail']}" for one in lines if one["outcome"] in BAD]
    assert not bad, "\n".join(bad)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines) == count * len(groups.split(","))


def test_the_page_is_that_of_the_last_run() -> None:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(figures)
    complete = all(group["run"] == group["planned"] for group in figures["groups"].values())
    assert ("**Incomplete**" in page) == (not complete)
    assert figures["violations"] == []
