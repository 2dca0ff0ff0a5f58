"""Defaults of dtype and place, with and without GPUs (which are pretended here)."""

import pytest
import torch

from hasten.loading.device import default_dtype, is_all_cpu, resolve_device_map
from hasten.loading.quantization import Storage
from hasten.loading.read import placement_notes

CPU = {"": torch.device("cpu")}


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)


@pytest.mark.parametrize(
    ("cuda", "bf16", "safe", "expected"),
    [
        (True, True, True, torch.bfloat16),
        (True, False, True, torch.float16),
        (True, False, False, torch.float32),
        (False, True, True, torch.bfloat16),
        (False, False, True, torch.float32),
    ],
)
def test_default_dtype(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, bf16: bool, safe: bool, expected: torch.dtype
) -> None:
    pretend(monkeypatch, cuda, bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": bf16})
    assert default_dtype(safe) == expected


def test_sixteen_bits_on_a_cpu_are_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert default_dtype(fp16_safe=True, half=True) == torch.bfloat16


@pytest.mark.parametrize("place", ["sequential", "auto", "balanced", "cpu"])
def test_without_cuda_everything_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    pretend(monkeypatch, cuda=False)
    assert resolve_device_map(place) == (CPU, [])
    assert is_all_cpu(CPU)


def test_with_cuda_transformers_places(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert resolve_device_map("balanced") == ("balanced", [])
    assert not is_all_cpu("balanced")
    assert resolve_device_map("cuda:1")[0] == {"": torch.device("cuda", 1)}
    assert resolve_device_map({"model": 0, "lm_head": "cpu"})[0] == {"model": 0, "lm_head": "cpu"}
    assert not is_all_cpu({"model": 0, "lm_head": "cpu"})


def test_under_torchrun_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    place, notes = resolve_device_map("sequential")
    assert place == {"": torch.device("cuda", 3)}
    assert "cuda:3" in notes[0]
    assert resolve_device_map({"": 0})[0] == {"": 0}


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("place", ["auto", CPU])
@pytest.mark.parametrize("stored", [True, False])
def test_a_checkpoint_that_goes_to_one_device_is_noted(
    monkeypatch: pytest.MonkeyPatch, gpus: int, place: object, stored: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    notes = placement_notes(Storage(stored=stored), place)
    assert bool(notes) == (stored and place == "auto" and gpus == 2)
    assert all("cuda:0" in note and "device_map='auto'" in note for note in notes)
