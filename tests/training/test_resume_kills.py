"""Kills at every operation of a save leave whole checkpoints only, and a run that is killed again and again ends as one that was not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_kit import STEPS, job_in
from safetensors.torch import load_file

from hasten.training.state_files import read_state

HERE = Path(__file__).parent


def start(*arguments: object) -> tuple[int, str]:
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_job.py"), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([paths, os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout[-4000:]


def test_every_operation_of_a_save_can_be_the_last(tmp_path: Path) -> None:
    """The limit is one checkpoint, so the older one is removed too: at each point one of both is there, and whole."""
    code, output = start("forks", tmp_path / "out")
    assert code == 0, output
    found = json.loads((tmp_path / "found.json").read_text())
    killed = [one for one in found if one["status"] == signal.SIGKILL]
    assert found[-1]["status"] == 0 and len(killed) == len(found) - 1 > 40, "too few operations were seen"
    assert all(one["visible"] == one["whole"] and one["whole"] for one in found)
    assert {one["last"] for one in killed} == {2, 4}
    assert found[-1]["visible"] == ["checkpoint-4"]


@pytest.mark.full
def test_a_run_that_is_killed_in_its_saves_ends_as_one_that_is_not(tmp_path: Path) -> None:
    whole, killed = (job_in(tmp_path / name) for name in ("whole", "killed"))
    assert start("run", whole, 0)[0] == 0
    for event in (30, 12, 25):
        code, output = start("run", killed, event)
        assert code == -signal.SIGKILL, output
    code, output = start("run", killed, 0)
    assert code == 0, output
    rows = [
        [json.loads(line) for line in (job.parent / "out/metrics.jsonl").read_text().splitlines()]
        for job in (whole, killed)
    ]
    assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]
    assert len(rows[0]) == STEPS
    ends = [job.parent / f"out/checkpoint-{STEPS}" for job in (whole, killed)]
    weights = [load_file(end / "adapter_model.safetensors") for end in ends]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    states = [read_state(end / "optimizer")["state"] for end in ends]
    assert all(torch.equal(states[0][n]["exp_avg_sq"], states[1][n]["exp_avg_sq"]) for n in states[0])
    saved = [load_file(job.parent / "out/model/adapter_model.safetensors") for job in (whole, killed)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
