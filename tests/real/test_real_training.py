"""Real weights: twenty QLoRA steps, the adapter they leave, its merge, and a run that is resumed half way."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from real_kit import batch, folder, ours, rows, stock
from safetensors.torch import load_file
from training_kit import ALL_LINEAR, apart, hf, logged, plain_settings
from transformers import BitsAndBytesConfig
from trl import SFTTrainer

from hasten import FastLanguageModel, sft_config

pytestmark = pytest.mark.real
STEPS, HALF, RANK = 20, 10, 8
HOW = {"max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-3, "seed": 3}
SAVING = {"save_strategy": "steps", "save_steps": HALF}


@dataclass
class Run:
    """initial: the adapter before training. losses: of each step. folder: of its checkpoints. saved: the adapter's folder."""

    model: Any
    tokenizer: Any
    initial: dict[str, torch.Tensor]
    losses: torch.Tensor
    folder: Path
    saved: Path


def trainer_of(folder: Path) -> tuple[SFTTrainer, Any, Any]:
    model, tokenizer = ours(load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=RANK, use_gradient_checkpointing=False)
    settings = {**plain_settings(folder, **HOW), **SAVING}
    config = sft_config(model, **settings)
    return SFTTrainer(model, args=config, train_dataset=rows(), processing_class=tokenizer), model, tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    trainer, model, tokenizer = trainer_of(folder)
    initial = adapter_of(model)
    trainer.train()
    model.save_pretrained_merged(folder / "adapter", tokenizer, save_method="lora")
    return Run(model, tokenizer, initial, logged(trainer, "loss"), folder, folder / "adapter")


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """The LoRA tensors by PEFT's own names."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_losses_fall_and_are_those_of_peft_and_bitsandbytes(run: Run, tmp_path: Path) -> None:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=ALL_LINEAR)
    model = get_peft_model(stock(quantization_config=nf4), config)
    missing = model.load_state_dict(run.initial, strict=False)
    assert not missing.unexpected_keys and run.initial
    trainer = hf(model, rows(), tmp_path, **HOW)
    trainer.train()
    assert apart(run.losses, logged(trainer, "loss")) < 1e-4
    assert run.losses[-4:].mean() < 0.5 * run.losses[:4].mean()


def test_the_adapter_is_small_and_holds_lora_alone(run: Run) -> None:
    """Rank 8 on the seven projections of 30 layers."""
    path = run.saved / "adapter_model.safetensors"
    tensors = load_file(path)
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
    assert sum(t.numel() for t in tensors.values()) == 30 * RANK * (
        2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)
    )
    assert path.stat().st_size < 11e6
    assert not json.loads((run.saved / "adapter_config.json").read_text())["modules_to_save"]
    assert sum(one.stat().st_size for one in run.saved.iterdir()) < 16e6, "adapter and tokenizer"


def test_plain_peft_loads_the_adapter_on_the_untouched_base(run: Run) -> None:
    inputs = {name: values for name, values in batch(2).items() if name != "labels"}
    plain = PeftModel.from_pretrained(stock(), str(run.saved)).eval()
    mine = ours(run.saved)[0].eval()
    with torch.no_grad():
        wanted, found = plain(**inputs).logits, mine(**inputs).logits
    kept = inputs["attention_mask"].bool()
    assert torch.allclose(found[kept], wanted[kept], atol=2e-4 * float(wanted.abs().max()))
    without = stock()
    with torch.no_grad():
        assert not torch.allclose(without(**inputs).logits[kept], wanted[kept], atol=0.1)


def test_the_merge_is_the_adapter_on_the_16_bit_base(run: Run, tmp_path: Path) -> None:
    inputs = {name: values for name, values in batch(2).items() if name != "labels"}
    done = run.model.save_pretrained_merged(tmp_path / "merged", run.tokenizer)
    assert done.bytes == sum(
        t.numel() * t.element_size() for t in load_file(Path(folder()) / "model.safetensors").values()
    )
    run.model.save_pretrained_merged(tmp_path / "exact", run.tokenizer, dtype=torch.float32)
    halves, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exact"))
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in halves.items())
    assert exact.keys() == halves.keys() and "lm_head.weight" not in halves, "tied weights are written once"
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(stock(), str(run.saved)).eval()(**inputs).logits
        found = stock(tmp_path / "exact")(**inputs).logits
    kept = inputs["attention_mask"].bool()
    assert torch.allclose(found[kept], wanted[kept], atol=2e-4 * float(wanted.abs().max()))


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not(run: Run, tmp_path: Path) -> None:
    trainer, model, _ = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=str(run.folder / f"checkpoint-{HALF}"))
    assert torch.equal(logged(trainer, "loss"), run.losses)
    assert adapter_of(model).keys() == run.initial.keys()
    ended = [load_file(f / f"checkpoint-{STEPS}/adapter_model.safetensors") for f in (tmp_path, run.folder)]
    assert ended[0].keys() == ended[1].keys()
    assert all(torch.equal(tensor, ended[1][name]) for name, tensor in ended[0].items())
