"""Resuming: ten steps equal five steps, a kill -9, and five more in a fresh process, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_job import CASES, SAVED, STEPS
from safetensors.torch import load_file

HERE = Path(__file__).parent


def start(case: str, folder: Path, part: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "resume_job.py"), case, str(folder), part]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int) -> None:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output[-4000:]


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{index}")
    else:
        assert bool((ours == theirs) if not hasattr(ours, "shape") else (ours == theirs).all()), where


FIRST, *OTHERS = CASES


@pytest.mark.parametrize("case", [FIRST, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)])
def test_ten_steps_are_five_and_five_after_a_kill(case: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    jobs = start(case, whole, "whole"), start(case, broken, "killed")
    finish(jobs[0], 0)
    finish(jobs[1], -signal.SIGKILL)
    assert not (broken / "diary.json").exists() and not (broken / f"checkpoint-{STEPS}").exists()
    finish(start(case, broken, "resumed"), 0)

    ends = [folder / f"checkpoint-{STEPS}" for folder in (whole, broken)]
    weights = [load_file(end / "adapter_model.safetensors") for end in ends]
    assert any("embed_tokens" in name for name in weights[0]) and any("lora_B" in name for name in weights[0])
    assert_same(weights[1], weights[0], "adapter")
    middle = load_file(whole / f"checkpoint-{SAVED}" / "adapter_model.safetensors")
    assert all(not torch.equal(middle[name], weights[0][name]) for name in middle), "a weight that does not train"
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(end / name, weights_only=True) for end in ends]
        assert_same(states[1], states[0], name)
    randoms = [torch.load(end / "rng_state.pth", weights_only=False) for end in ends]
    assert_same(randoms[1], randoms[0], "random states")

    whole_diary, resumed_diary = (json.loads((folder / "diary.json").read_text()) for folder in (whole, broken))
    assert whole_diary["after"] == resumed_diary["after"] and whole_diary["before"] == resumed_diary["before"]
    assert [name for name, _ in whole_diary["before"]] == [name for name, _ in whole_diary["after"]]
    assert {dtype for _, dtype in whole_diary["after"]} == {"torch.float32"}
    batches = 2 * (STEPS - SAVED)
    assert resumed_diary["seen"][-batches:] == whole_diary["seen"][-batches:]
    assert len({str(batch) for batch in whole_diary["seen"]}) > batches, "the order never changed between epochs"
    steps = [
        [(e["step"], e["loss"], e["learning_rate"]) for e in d["log"] if "loss" in e]
        for d in (whole_diary, resumed_diary)
    ]
    assert steps[0] == steps[1] and len(steps[0]) == STEPS
