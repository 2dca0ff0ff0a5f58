"""Whole jobs come out the same whatever layers keep: bit for bit, since all run on the CPU."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_job import MODES, RANKS, all_rows, labels, model_in
from memory_kit import policy_of
from training_kit import curve, dpo, gradients_apart, gradients_of, lora, preferences, rows, sft, small

from hasten.training import checkpointing
from hasten.training.memory.actions import ActivationAction
from hasten.training.optimizers import StochasticAdamW

TRAINING = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("offload_everything")


def model_with(mode: str, **adapter: Any) -> Any:
    model = small("llama", True, lora(**adapter))
    checkpointing.enable(model, *MODES[mode])
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, Any]) -> None:
    """found: of each mode (curve, weights)."""
    losses, weights = found["kept"]
    for mode, (other_losses, other_weights) in found.items():
        assert torch.equal(other_losses, losses), mode
        assert other_weights.keys() == weights.keys()
        assert all(torch.equal(other_weights[name], weights[name]) for name in weights), mode


def jobs(
    make: Any, data: Any, folder: Path, modes: Any = MODES, dropout: float = 0.0, **changes: Any
) -> dict[str, Any]:
    """(curve, trained weights) of one job in each mode; every mode must have done what it says."""
    found = {}
    for mode in modes:
        model = model_with(mode, lora_dropout=dropout)
        before = trained(model)
        found[mode] = curve(make(model, data, folder, **changes)), trained(model)
        assert any(not torch.equal(before[name], after) for name, after in found[mode][1].items())
        policy = policy_of(model)
        actions = set(policy.latest.actions) if policy.latest is not None else {ActivationAction.SAVE_ALL}
        assert (actions == {ActivationAction.SAVE_ALL}) == (mode in ("kept", "planned, room")), mode
        assert bool(policy.runner.host) == (mode == "offloaded")
    return found


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ddp")
    paths = os.pathsep.join([str(TRAINING.parent.parent), str(TRAINING), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TRAINING / "ddp_job.py"), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-4000:]
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_are_one_over_the_same_rows(
    mode: str, of_two_processes: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Each accumulates two batches, of which the first one is not synchronised."""
    model = model_in("kept")
    for ids in all_rows():
        model(input_ids=ids, labels=ids, num_items_in_batch=labels()).loss.backward()
    assert gradients_apart(of_two_processes[mode], gradients_of(model)) < 1e-6
    assert gradients_apart(of_two_processes[mode], of_two_processes["kept"]) == 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fine_tuning(dropout: float, tmp_path: Path) -> None:
    data = rows(12, seed=3)
    changes = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert_same(jobs(sft, data, tmp_path, dropout=dropout, **changes))


def test_preference_optimisation(tmp_path: Path) -> None:
    """Where the reference is the model itself with its adapter switched off, without gradients, between two steps."""
    assert_same(jobs(dpo, preferences(8, seed=3), tmp_path, max_steps=3, per_device_train_batch_size=2))


@pytest.mark.parametrize("how", [{"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}])
def test_packed_rows(how: dict[str, Any], tmp_path: Path) -> None:
    changes = {"max_steps": 3, "per_device_train_batch_size": 2, **how}
    assert_same(jobs(sft, rows(12, seed=6), tmp_path, **changes))


def test_a_run_that_is_taken_up_again(tmp_path: Path) -> None:
    data = rows(12, seed=7)
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3}
    whole = model_with("offloaded", lora_dropout=0.2)
    losses = curve(sft(whole, data, tmp_path, **settings))
    resumed = model_with("offloaded", lora_dropout=0.2)
    trainer = sft(resumed, data, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert again == losses.tolist() and trainer.state.global_step == 6
    assert_same({"kept": (losses, trained(whole)), "resumed": (losses, trained(resumed))})


def test_evaluation_in_between_changes_nothing_and_leaves_nothing_behind(tmp_path: Path) -> None:
    data, found, taken = rows(12, seed=8), {}, []
    for strategy in ("no", "steps"):
        model = model_with("offloaded")  # with dropout the evaluation's data loader would move its random numbers
        held = {"eval_dataset": rows(6, longest=60, seed=9)}
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "eval_strategy": strategy, "eval_steps": 2}
        trainer = sft(model, data, tmp_path, held, **settings)
        losses = curve(trainer)
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == (2 if strategy == "steps" else 0)
        found["kept" if strategy == "no" else "evaluated"] = losses, trained(model)
        gc.collect()
        runner = policy_of(model).runner
        runner.outgoing.clear()  # the last layer's, which its successor would have taken the place of
        (memory,) = runner.host.values()
        assert len(memory.free) * memory.sizes.chunk == memory.allocated
        taken.append(memory.allocated)
    assert_same(found)
    assert taken[0] == taken[1]


def test_full_fine_tuning_in_bf16() -> None:
    found = {}
    for mode in MODES:
        model = small("llama", True, None).to(torch.bfloat16).requires_grad_(True)
        checkpointing.enable(model, *MODES[mode])
        optimizer = StochasticAdamW(model.parameters(), lr=1e-2, seed=4)
        losses = []
        for ids in all_rows()[:2]:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        found[mode] = torch.stack(losses), trained(model)
    assert_same(found)
