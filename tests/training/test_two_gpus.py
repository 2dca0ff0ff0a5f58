"""Two GPUs of one machine: a model split over them, a process on each, and trainers that would spread one model over both."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from ddp_job import MODES, RANKS, all_rows, labels, model_in
from training_kit import gradients_apart, gradients_of, plain_settings, rows, stir
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

from hasten import FastLanguageModel, sft_config
from hasten.errors import TrainingError
from hasten.testing import save_tiny
from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.policy import policy_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.usefixtures("offload_everything"),
]
HERE = Path(__file__).parent
IDS = torch.randint(6, 288, (2, 40), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "gemma2", "cohere")
HALVES = {
    "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.rotary_emb": 0,
    "model.layers.2": 1, "model.layers.3": 1, "model.norm": 1,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save_tiny(folder, request.param, tie_word_embeddings=request.param != "llama")


def load(folder: Path, place: Any, four: bool = False, mode: Any = False, dtype: Any = torch.float32) -> Any:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype=dtype, load_in_4bit=four, device_map=place
    )
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=mode)
    stir(model)
    return model.train()


def halves(folder: Path) -> dict[str, int]:
    """The head on the last layers' GPU, or, where it is the embedding too, on the embedding's."""
    return HALVES | {"lm_head": int("llama" in folder.name)}


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    ids = IDS.to("cuda:0")
    loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(78, device="cuda:0")).loss
    loss.backward()
    return float(loss.detach()), {name: g.cpu() for name, g in gradients_of(model).items()}


@pytest.mark.parametrize("mode", [False, True, "offload", "unsloth"])
@pytest.mark.parametrize("four", [False, True], ids=["dense", "NF4"])
def test_a_model_split_over_both_is_the_model_on_one(folder: Path, four: bool, mode: Any) -> None:
    expected, wanted = step(load(folder, "cuda:0", four))
    model = load(folder, halves(folder), four, mode)
    assert {p.device.index for p in model.parameters()} == {0, 1}
    torch.cuda.set_device(0)
    for _ in range(2):  # the second one runs over host memory that was used before
        model.zero_grad()
        found, gradients = step(model)
        assert abs(found - expected) < 1e-5 and len(gradients) == len(wanted)
        assert gradients_apart(gradients, wanted) < 1e-5
    if mode == "unsloth":
        policy = policy_of(model)
        latest = None if policy is None else policy.latest
        assert latest is not None and set(latest.actions) == {ActivationAction.OFFLOAD}


def test_a_model_on_the_second_while_the_first_is_current(folder: Path) -> None:
    expected, wanted = step(load(folder, "cuda:0"))
    model = load(folder, "cuda:1", mode="offload")
    torch.cuda.set_device(0)
    found = model(input_ids=IDS.to("cuda:1"), labels=IDS.to("cuda:1")).loss
    found.backward()
    assert abs(float(found.detach()) - expected) < 1e-5
    assert gradients_apart({name: g.cpu() for name, g in gradients_of(model).items()}, wanted) < 1e-5
    assert model.for_inference().generate(input_ids=IDS.to("cuda:1"), max_new_tokens=4).shape == (2, 44)


@pytest.mark.parametrize("place", ["cuda:0", "balanced", "halves"])
@pytest.mark.parametrize("four", [False, True], ids=["dense", "NF4"])
def test_a_trainer_takes_the_rows_of_one_process(place: str, four: bool, tmp_path: Path, caplog: Any) -> None:
    checkpoint = save_tiny(tmp_path / "llama", "llama", tie_word_embeddings=False)
    curves = []
    for where in ("cuda:0", halves(checkpoint) if place == "halves" else place):
        model = load(checkpoint, where, four, "unsloth", torch.bfloat16)
        settings = plain_settings(tmp_path, max_steps=4, use_cpu=False, bf16=True)
        config = sft_config(model, **settings)
        trainer = SFTTrainer(model, args=config, train_dataset=rows(16))
        assert config.n_gpu == 1 and config.train_batch_size == 4
        trainer.train()
        curves.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    assert "one of 2 GPUs" in caplog.text
    assert len(curves[0]) == 4 and torch.allclose(curves[0], curves[1], atol=2e-2)


@pytest.mark.parametrize("four", [False, True], ids=["dense", "NF4"])
def test_a_config_that_counts_both_is_refused(four: bool, tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "llama", "llama")
    model = load(checkpoint, "cuda:0", four, dtype=torch.bfloat16)
    config = TrainingArguments(**plain_settings(tmp_path, max_steps=1, use_cpu=False))
    same = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.repeat(4, 1)]
    trainer = Trainer(model, args=config, train_dataset=Dataset.from_list(same))
    with pytest.raises(TrainingError, match="torchrun"):
        trainer.train()


def test_a_process_on_each_is_one_over_the_same_rows(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, str(HERE / "ddp_job.py")]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path), "cuda"], env=environment) for rank in range(RANKS)]
    assert [process.wait(timeout=180) for process in ranks] == [0] * RANKS
    found = torch.load(tmp_path / "gradients.pt", weights_only=True, map_location="cpu")
    model = model_in("kept").to("cuda:0")
    for ids in all_rows():
        model(input_ids=ids.to("cuda:0"), labels=ids.to("cuda:0"), num_items_in_batch=labels()).loss.backward()
    wanted = {name: g.cpu() for name, g in gradients_of(model).items()}
    assert set(found) == set(MODES)
    for gradients in found.values():
        assert gradients_apart(gradients, wanted) < 1e-5
