"""A tiny job that stops in the middle of its run, and what its folder holds then."""

import json
from pathlib import Path
from typing import Any

import yaml

from hasten import FastLanguageModel
from hasten.testing.tiny import save_tiny
from hasten.training.config import read_job
from hasten.training.job import Finished, run

STEPS, SAVED = 6, 2
TRAIN = {
    "output_dir": "out",
    "max_steps": STEPS,
    "save_steps": SAVED,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "assistant_only_loss": True,
    "seed": 1,
}


class Stopped(Exception):
    """In place of a power cut."""


def chats(count: int = 16, changed: int | None = None) -> list[dict[str, Any]]:
    """changed: the chat whose answer has another last letter."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i}" + ("!" if i == changed else ".")},
            ]
        }
        for i in range(count)
    ]


def job_in(folder: Path, **sections: Any) -> Path:
    """A job file beside a tiny model and its data; sections are added to, None removes one."""
    folder.mkdir(exist_ok=True)
    if not (folder / "base").exists():
        save_tiny(folder / "base", amplify=1.0)
    if not (folder / "rows.jsonl").exists():
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats()))
    job: dict[str, Any] = {
        "model": {
            "model_name": "base",
            "dtype": "bfloat16",
            "max_seq_length": 64,
            "load_in_4bit": False,
            "use_gradient_checkpointing": False,
        },
        "adapter": {"r": 4},
        "data": {"path": "rows.jsonl"},
        "train": TRAIN,
    }
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values} if values is not None else None
    (folder / "job.yaml").write_text(yaml.safe_dump({name: part for name, part in job.items() if part is not None}))
    return folder / "job.yaml"


def train(path: Path, resume: bool | str = False, stop_at: int | None = None) -> Finished:
    """stop_at: the training batch at which the run stops."""
    batches = []

    def count(module: Any, args: Any, output: Any) -> None:
        if module.training:
            batches.append(1)
            if len(batches) == stop_at:
                raise Stopped

    def load(**options: Any) -> Any:
        model, tokenizer = FastLanguageModel.from_pretrained(**options)
        model.get_input_embeddings().register_forward_hook(count)
        return model, tokenizer

    return run(read_job(path), load, FastLanguageModel.get_peft_model, resume=resume)
