"""Tiny inputs for the command line's tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from hasten.testing.tiny import save_tiny

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i} " * (1 + i % 3)},
        ]
    }
    for i in range(16)
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_job(folder: Path, **sections: Mapping[str, Any]) -> Path:
    """A job on a tiny llama and sixteen short chats; `sections` add to its sections or replace what is there."""
    if not (folder / "base").exists():
        save_tiny(folder / "base", amplify=1.0)
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", CHATS)
    job: dict[str, dict[str, Any]] = {
        "model": {"model_name": "base", "max_seq_length": 64, "load_in_4bit": False},
        "adapter": {"r": 4},
        "data": {"path": "rows.jsonl"},
        "train": {
            "output_dir": "out",
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": "1e-2",
            "assistant_only_loss": True,
            "save_strategy": "no",
            "seed": 1,
        },
    }
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing inside the test may build a model, with weights or without."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(PreTrainedModel, "__init__", refused)
