"""From a checked job file to a trained, saved model. TRL's SFTTrainer trains; this only puts the parts together."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from transformers.trainer_utils import get_last_checkpoint

from hasten.data import DatasetCounts, check_dataset, drop_long, read_dataset, refuse_rows, tokenized
from hasten.errors import DatasetError, MissingExtraError, OptionError, TrainingError
from hasten.training.config import Job
from hasten.training.metrics import counting
from hasten.training.optimizers import STOCHASTIC, stochastic_adamw
from hasten.training.progress import TrainingMonitor
from hasten.training.trainer import max_seq_length_of, sft_config

DEFAULTS = {
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # it would hide the very numbers at which a run must stop
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Finished:
    """loss: mean over the run, in nats per token. counts: of the training data. folder: metrics.jsonl, loss.png, summary.json.

    saved: the model's folder. dropped: examples dropped for being too long.
    """

    model: Any
    tokenizer: Any
    steps: int
    loss: float
    counts: DatasetCounts
    dropped: int
    folder: Path
    saved: Path


def run(
    job: Job,
    load: Callable[..., tuple[Any, Any]],
    adapt: Callable[..., Any],
    console: Console | None = None,
    resume: bool = False,
) -> Finished:
    """Trains and saves. load, adapt: `FastLanguageModel.from_pretrained` and `.get_peft_model`.

    resume: continue from the newest checkpoint of `job.output`. Data are read before the model is; what is wrong with
    either raises before step 1. Raises DatasetError, OptionError, CheckpointError, TrainingError, ExportError.
    """
    checkpoint = _last_checkpoint(job.output) if resume else None
    train_data, eval_data = read_dataset(job.data)
    model, tokenizer = load(**job.model)
    if not job.model.get("full_finetuning") and (job.adapter is not None or not hasattr(model, "peft_config")):
        model = adapt(model, **(job.adapter or {}))
    trainer = make_trainer(model, tokenizer, job, train_data, eval_data)
    counts, dropped = _apply_too_long(trainer, train_data, job.data.too_long)
    title = f"{Path(str(job.model['model_name'])).name}: training loss"
    with counting(model) as counter, TrainingMonitor(job.output, counter, console, title) as monitor:
        result = monitor.watch(trainer).train(resume_from_checkpoint=checkpoint)
    method = job.save.method or ("lora" if hasattr(model, "peft_config") else "merged_16bit")
    steps, loss = result.global_step, result.training_loss
    finished = Finished(model, tokenizer, steps, loss, counts, dropped, job.output, job.saved)
    if trainer.is_world_process_zero():
        model.save_pretrained_merged(job.saved, tokenizer, save_method=method)
        _write_summary(finished, method)
    return finished


def make_trainer(model: Any, tokenizer: Any, job: Job, train_data: Any, eval_data: Any) -> Any:
    """TRL's SFTTrainer for `job`. Raises OptionError for settings that TRL or transformers refuses."""
    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise MissingExtraError("hasten train", "trl", "train") from error
    settings = {**DEFAULTS, "eval_strategy": "no" if eval_data is None else "epoch", **job.train}
    if job.data.text_field:
        settings["dataset_text_field"] = job.data.text_field
    if eval_data is None and settings["eval_strategy"] != "no":
        asked = settings["eval_strategy"]
        problem = f"train.eval_strategy={asked!r} needs evaluation data; set data.eval_split or data.eval_path"
        raise OptionError("train", [problem])
    try:
        stochastic = settings.get("optim") == STOCHASTIC
        if stochastic:
            del settings["optim"]
        config = sft_config(model, output_dir=str(job.output), **settings)
        return SFTTrainer(
            model=model,
            args=config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=stochastic_adamw(config) if stochastic else None,
        )
    except OptionError:
        raise
    except (ValueError, TypeError, TemplateError) as error:
        refuse_rows(tokenizer, {"train": train_data, "eval": eval_data})
        raise OptionError("train", [f"the trainer refuses these settings or data: {error}"]) from error


def _apply_too_long(trainer: Any, dataset: Any, policy: str) -> tuple[DatasetCounts, int]:
    """Counts the training data and applies `data.too_long`. Returns the counts and how many examples were dropped.

    TRL has already truncated what the trainer holds, except with `padding_free` alone, where it truncates nothing.
    """
    limit = trainer.args.max_length or max_seq_length_of(trainer.model)
    if trainer.args.max_length is None:
        counts = check_dataset(tokenized(dataset, trainer, "train"), max_length=limit)
    else:
        counts = check_dataset(dataset, trainer)
    if not counts.truncated or limit is None:
        return counts, 0
    too_long = (
        f"{counts.truncated} of {counts.examples} examples are longer than max_seq_length={limit} "
        f"({counts.lost} tokens too many)"
    )
    if policy == "drop":
        drop_long(trainer, dataset, limit)
        return counts, counts.truncated
    if policy == "error":
        raise DatasetError(
            f"{too_long}, and too_long is 'error'; raise model.max_seq_length, or use too_long: truncate or drop"
        )
    if trainer.args.max_length is None:
        raise DatasetError(
            f"{too_long}, and padding_free without packing cannot truncate them; use packing, or too_long: drop"
        )
    return counts, 0


def _last_checkpoint(folder: Path) -> str:
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise TrainingError(
            f"{folder} holds no checkpoint to resume from; train without --resume, and set train.save_steps so that "
            "checkpoints are written"
        )
    return found


def _write_summary(finished: Finished, method: str) -> None:
    summary = {
        "steps": finished.steps,
        "mean_loss": finished.loss,
        "dataset": asdict(finished.counts),
        "dropped_too_long": finished.dropped,
        "saved": str(finished.saved),
        "save_method": method,
    }
    path = finished.folder / "summary.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
