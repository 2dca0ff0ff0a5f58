"""summary.json: written when a run is trained and its model saved. With it a run is finished, without it it is not."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hasten.data import DatasetCounts
from hasten.training.config import Job

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Finished:
    """loss: mean over the run, in nats per token. counts: of the training data. folder: metrics.jsonl, loss.png, summary.json.

    saved: the model's folder. dropped: examples dropped for being too long. already: the run was finished before and nothing
    was done; model and tokenizer are None then.
    """

    model: Any
    tokenizer: Any
    steps: int
    loss: float
    counts: DatasetCounts
    dropped: int
    folder: Path
    saved: Path
    already: bool = False


def write_summary(finished: Finished, job: Job, method: str) -> None:
    """Writes summary.json, completely or not at all. method: as `save_pretrained_merged`."""
    summary = {
        "steps": finished.steps,
        "mean_loss": finished.loss,
        "dataset": asdict(finished.counts),
        "dropped_too_long": finished.dropped,
        "saved": str(finished.saved),
        "save_method": method,
        "job": _digest(job),
    }
    path = finished.folder / SUMMARY
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def find_finished(job: Job) -> Finished | None:
    """The result of `job` where its summary says that this very job file was trained, and the model is still there."""
    try:
        found = json.loads((job.output / SUMMARY).read_text(encoding="utf-8"))
        if found["job"] != _digest(job) or not any(job.saved.iterdir()):
            return None
        counts, loss = DatasetCounts(**found["dataset"]), float(found["mean_loss"])
        dropped, steps = int(found["dropped_too_long"]), int(found["steps"])
    except (OSError, ValueError, KeyError, TypeError):  # no summary of a finished run of ours
        return None
    return Finished(None, None, steps, loss, counts, dropped, job.output, job.saved, already=True)


def _digest(job: Job) -> str:
    """Of everything in the job file, with paths relative to the output, so that a folder may move with all it holds."""
    text = json.dumps(_relative(asdict(job), job.output), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _relative(value: Any, start: Path) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _relative(inner, start) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_relative(inner, start) for inner in value]
    if isinstance(value, str | Path) and Path(value).is_absolute() and Path(value).anchor == start.anchor:
        return os.path.relpath(value, start)
    return value
