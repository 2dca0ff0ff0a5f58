"""From a checked job file to a trained, saved model. TRL's SFTTrainer trains; this only puts the parts together."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from rich.markup import escape

from hasten.data import DatasetCounts, check_dataset, drop_long, read_dataset, refuse_rows, tokenized
from hasten.errors import DatasetError, MissingExtraError, OptionError
from hasten.training.checkpoints import Checkpoint, last_whole
from hasten.training.config import Job
from hasten.training.metrics import counting
from hasten.training.optimizers import STOCHASTIC, stochastic_adamw
from hasten.training.progress import TrainingMonitor
from hasten.training.resume import FORCE, load_weights, refuse_used, resumable, resume_point, sole_writer, total_steps
from hasten.training.summary import SUMMARY, Finished, find_finished, write_summary
from hasten.training.trainer import max_seq_length_of, sft_config

logger = logging.getLogger(__name__)

DEFAULTS = {
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # it would hide the very numbers at which a run must stop
    "report_to": "none",
    "disable_tqdm": True,
}


def run(
    job: Job,
    load: Callable[..., tuple[Any, Any]],
    adapt: Callable[..., Any],
    console: Console | None = None,
    resume: bool | str = False,
) -> Finished:
    """Trains and saves. load, adapt: `FastLanguageModel.from_pretrained` and `.get_peft_model`.

    resume: True = continue from the newest whole checkpoint of `job.output`, which must be of the same run; "force" = also
    with other settings. Without it a folder with checkpoints is refused. Data are read before the model is; what is wrong with
    either raises before step 1. Raises DatasetError, OptionError, CheckpointError, TrainingError, ExportError.
    """
    checkpoint = None
    if resume:
        if (finished := find_finished(job)) is not None:
            return finished
        checkpoint = replace(last_whole(job.output), forced=resume == FORCE)
    else:
        refuse_used(job.output)
    train_data, eval_data = read_dataset(job.data)
    model, tokenizer = load(**job.model)
    if not job.model.get("full_finetuning") and (job.adapter is not None or not hasattr(model, "peft_config")):
        model = adapt(model, **(job.adapter or {}))
    trainer = make_trainer(model, tokenizer, job, train_data, eval_data)
    counts, dropped = _apply_too_long(trainer, train_data, job.data.too_long)
    with sole_writer(job.output):
        if checkpoint is not None:
            checkpoint = resume_point(trainer, checkpoint)
        steps, loss = _train(trainer, job, checkpoint, console)
        method = job.save.method or ("lora" if hasattr(model, "peft_config") else "merged_16bit")
        finished = Finished(model, tokenizer, steps, loss, counts, dropped, job.output, job.saved)
        if trainer.is_world_process_zero():
            model.save_pretrained_merged(job.saved, tokenizer, save_method=method)
            write_summary(finished, job, method)
    return finished


def _train(trainer: Any, job: Job, checkpoint: Checkpoint | None, console: Console | None) -> tuple[int, float]:
    """(steps, mean loss) of the run. Loads the weights alone where `checkpoint` is the last step's."""
    if checkpoint is not None:
        total = total_steps(trainer)
        text = f"{checkpoint.folder}, step {checkpoint.step} of {total}"
        _say(console, f"training is finished: {text}" if checkpoint.step >= total else f"resuming from {text}")
        if checkpoint.step >= total:
            load_weights(trainer, checkpoint)
            return checkpoint.step, _mean_loss(checkpoint)
    if trainer.is_world_process_zero():
        (job.output / SUMMARY).unlink(missing_ok=True)
        if checkpoint is None and (job.output / "metrics.jsonl").exists():
            logger.warning("%s holds the metrics of an earlier run without checkpoints; they are replaced", job.output)
    title = f"{Path(str(job.model['model_name'])).name}: training loss"
    with counting(trainer.model) as counter, TrainingMonitor(job.output, counter, console, title) as monitor:
        result = monitor.watch(trainer).train(resume_from_checkpoint=checkpoint)
    return result.global_step, result.training_loss


def _mean_loss(checkpoint: Checkpoint) -> float:
    logged = [entry["loss"] for entry in checkpoint.state.get("log_history", []) if "loss" in entry]
    return sum(logged) / len(logged) if logged else float("nan")


def _say(console: Console | None, text: str) -> None:
    if console is None:
        logger.info(text)
    else:
        console.print(escape(text), soft_wrap=True)


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
        return resumable(SFTTrainer)(
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
