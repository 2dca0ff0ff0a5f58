"""Two thousand training steps with hasten and with unmodified PEFT: memory stays flat, and the losses stay together."""

from pathlib import Path
from typing import Any

import torch
from campaign_bases import Bases
from guarantee_kit import anonymous
from peft import LoraConfig, get_peft_model
from training_kit import hf, rows
from transformers import AutoModelForCausalLM, TrainerCallback

from hasten import FastLanguageModel
from hasten.testing import save_tiny

STEPS, WARM, EVERY = 2000, 400, 50
ALLOWED_GROWTH = 8 * 2**20
ALLOWED_DRIFT = 1e-3
"""Relative, of the mean loss over `EVERY` steps. Rounding alone moves single losses apart by about 1e-5 in that time."""


class Watch(TrainerCallback):
    """Bytes of memory, every `EVERY` steps."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self.bytes.append(anonymous())


def make(root: Path) -> None:
    """The checkpoint, not amplified so that it learns."""
    save_tiny(root / "soak", "llama", amplify=1.0, num_hidden_layers=2, tie_word_embeddings=False)


def trained(root: Path, scratch: Path, with_hasten: bool, steps: int) -> tuple[torch.Tensor, list[int]]:
    """(mean loss of every `EVERY` steps, bytes of memory as often)."""
    torch.manual_seed(0)
    if with_hasten:
        model, _ = FastLanguageModel.from_pretrained(
            str(root / "soak"), 64, torch.float32, load_in_4bit=False, use_gradient_checkpointing=False
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(root / "soak", dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    watch = Watch()
    how = {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 2e-3, "seed": 3}
    trainer = hf(model, rows(64), scratch / str(with_hasten), {"callbacks": [watch]}, **how)
    trainer.train()
    losses = torch.tensor(
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64
    )
    return losses.view(-1, EVERY).mean(dim=1), watch.bytes


def judge_soak(bases: Bases, seed: int, scratch: Path, steps: int = STEPS) -> tuple[str, str, str]:
    """One run after the other in one process."""
    (ours, memory), (theirs, _) = (trained(bases.root, scratch, kind, steps) for kind in (True, False))
    drift = float(((ours - theirs).abs() / theirs).max())
    start = min(WARM, steps // 2) // EVERY
    growth = max(memory[start:]) - memory[start]
    what = f"{steps} steps with and without hasten"
    detail = (
        f"loss {float(ours[0]):.4f} to {float(ours[-1]):.4f}; largest relative difference of mean losses {drift:.1e}; "
        f"memory after the warm-up grows by {growth / 2**20:.1f} MiB"
    )
    good = drift < ALLOWED_DRIFT and growth < ALLOWED_GROWTH and ours[-1] < ours[0]
    return ("flat" if good else "silent difference"), what, detail
