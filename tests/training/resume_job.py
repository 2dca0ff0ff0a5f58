"""A training job to be run as a process of its own: `python resume_job.py CASE FOLDER whole|killed|resumed`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from training_kit import ALL_LINEAR, rows, sft, small
from transformers import TrainerCallback

from hasten.model import FastLanguageModel

STEPS, SAVED, KILLED = 10, 5, 7

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "embedding and head": (
        {"model_type": "llama", "tie_word_embeddings": False},
        {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    ),
    "tied, NF4": ({"model_type": "gemma2", "nf4": True}, {"target_modules": [*ALL_LINEAR, "embed_tokens"]}),
}


class Diary(TrainerCallback):
    """Writes down, per step, the rows seen; and kills the process without any warning at a given step."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.folder, self.kill_at, self.seen = folder, kill_at, []

    def watch(self, trainer: Any) -> None:
        inner = trainer.data_collator

        def collate(examples: list[dict[str, Any]]) -> Any:
            self.seen.append([example["input_ids"][:6] for example in examples])
            return inner(examples)

        trainer.data_collator = collate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kill_at is not None and state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(model: Any) -> list[tuple[str, str]]:
    return sorted((name, str(p.dtype)) for name, p in model.named_parameters() if p.requires_grad)


def main(case: str, folder: Path, part: str) -> None:
    torch.manual_seed(0)
    build, adapt = CASES[case]
    model = FastLanguageModel.get_peft_model(small(hasten=True, **build), r=4, lora_dropout=0.1, **adapt)
    diary = Diary(folder, KILLED if part == "killed" else None)
    trainer = sft(
        model,
        rows(24, seed=8),
        folder,
        {"callbacks": [diary]},
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=SAVED,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        seed=5,
    )
    diary.watch(trainer)
    before = trained(model)
    trainer.train(resume_from_checkpoint=part == "resumed")
    record = {"before": before, "after": trained(model), "seen": diary.seen, "log": trainer.state.log_history}
    (folder / "diary.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
