"""States of optimizers and random generators survive safetensors and JSON, bit for bit and type for type."""

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from hasten.training.state_files import random_state, read_state, set_random_state, state_problems, write_state


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return a.dtype == b.dtype and numpy.array_equal(a, b)
    return a == b or (a != a and b != b)


def test_every_kind_of_value(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": whole[:6].view(2, 3).T, "codes": whole.to(torch.uint8)},
            7: {},
        },
        "shared": [whole, whole[2:4]],
        "group": [{"lr": 1e-4, "betas": (0.9, 0.999), "fused": None, "big": 2**70, "off": False, "name": "é\n"}],
        "odd": [
            float("inf"),
            float("-inf"),
            float("nan"),
            1e-310,
            torch.zeros(0),
            torch.ones((), dtype=torch.bfloat16),
        ],
        "numpy": (numpy.arange(5, dtype=numpy.uint32), numpy.float64(0.1)),
    }
    write_state(tmp_path / "optimizer", state)
    read = read_state(tmp_path / "optimizer")
    state["numpy"] = (state["numpy"][0], 0.1)  # a numpy scalar becomes a number
    assert same(read, state) and state_problems(tmp_path) == []


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a set cannot be stored"):
        write_state(tmp_path / "x", {"a": {1, 2}})


def test_random_generators_go_on(tmp_path: Path) -> None:
    write_state(tmp_path / "rng_state", random_state(every_gpu=False))

    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    first = draw()
    assert draw() != first
    set_random_state(read_state(tmp_path / "rng_state"))
    assert draw() == first


@pytest.mark.parametrize("name", ["optimizer.json", "optimizer.safetensors"])
def test_half_a_state_is_a_problem(tmp_path: Path, name: str) -> None:
    write_state(tmp_path / "optimizer", {"a": torch.ones(2)})
    (tmp_path / name).unlink()
    assert state_problems(tmp_path) == [f"{name} is missing"]
