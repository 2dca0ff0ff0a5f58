"""Glue for TRL's SFTTrainer, which stays TRL's own: a config that fits the model, and a look at the data before step 1."""

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hasten.errors import DatasetError, OptionError
from hasten.overlays import HeadOverlay
from hasten.state import causal_lm_of
from hasten.training.optimizers import optimizer_problems

if TYPE_CHECKING:
    from trl import SFTConfig

logger = logging.getLogger(__name__)
IGNORED = -100
MASKS = ("completion_mask", "assistant_masks")


def longest_row(model: Any) -> int | None:
    """`max_seq_length` that the model was loaded with, or None where it has no such limit."""
    base = causal_lm_of(model)
    return base.overlay_config.max_seq_length if isinstance(base, HeadOverlay) else None


def sft_config(model: Any, **kwargs: Any) -> "SFTConfig":
    """A `trl.SFTConfig` whose defaults are the model's instead of TRL's; every name in `kwargs` is SFTConfig's.

    max_length: the model's `max_seq_length` (TRL would cut rows at 1024). None where nothing is cut: for a model without
    a limit, and for `padding_free` without packing, of which TRL demands it; rows that are too long then raise InputError.
    gradient_checkpointing: False, so that the trainer leaves the model as `use_gradient_checkpointing` set it.
    One process takes one GPU; torchrun starts one for each.
    bf16, fp16: on where the model computes in that dtype. use_cpu: on where the model is on the CPU. Raises OptionError
    for a `max_length` beyond the model's limit, for packing without any length, and for an `optim` whose package is missing.
    """
    from trl import SFTConfig

    limit = longest_row(model)
    packing = bool(kwargs.get("packing", False))
    uncut = bool(kwargs.get("padding_free", False)) and not packing
    base = causal_lm_of(model)
    settings = {"max_length": None if uncut else limit, "use_cpu": base.device.type == "cpu", **kwargs}
    # Renamed in transformers 5.23; the old name warns there, and stays the one that callers know.
    new = "activation_checkpointing"
    name = new if new in SFTConfig.__dataclass_fields__ else "gradient_checkpointing"
    settings.setdefault(name, settings.pop("gradient_checkpointing", False))
    if "bf16" not in kwargs and "fp16" not in kwargs:
        settings |= {"bf16": base.dtype == torch.bfloat16, "fp16": base.dtype == torch.float16}
    asked = settings["max_length"]
    problems = []
    if limit is not None and asked is not None and asked > limit:
        problems.append(
            f"max_length={asked} is more than the model's max_seq_length={limit}; load the model with "
            f"max_seq_length={asked}, or ask for at most {limit}"
        )
    if packing and asked is None:
        problems.append("packing=True fills rows of max_length tokens, but there is no max_length; give one")
    problems += optimizer_problems(settings.get("optim"))
    if problems:
        raise OptionError("sft_config", problems)
    return _on_one_gpu(SFTConfig(**settings), base)


def _on_one_gpu(config: "SFTConfig", base: Any) -> "SFTConfig":
    """One process trains on one GPU, or on those that its model lies on: transformers would copy the model to all that are visible
    at every step (nn.DataParallel) and take so many times the rows."""
    if config.n_gpu > 1:
        if len({p.device for p in base.parameters()}) == 1:
            text = "training on %s, one of %d GPUs that are visible; torchrun --nproc_per_node N takes N of them"
            logger.warning(text, base.device, config.n_gpu)
        config._n_gpu = 1  # as Trainer does for a model that lies on several
    return config


@dataclass(frozen=True)
class DatasetCounts:
    """What training will see of a dataset. All None but `rows` where the dataset is not tokenised yet, and `rows` too
    where it is a stream.

    truncated: rows that are cut. lost: tokens cut off. masked: rows without a single label to learn, after the cut.
    tokens, labels: tokens that are left, and those among them that are learned.
    """

    rows: int | None
    truncated: int | None = None
    lost: int | None = None
    masked: int | None = None
    tokens: int | None = None
    labels: int | None = None

    def __str__(self) -> str:
        if self.rows is None or self.truncated is None:
            return f"{'a stream of' if self.rows is None else self.rows} rows, not counted"
        return (
            f"{self.rows} rows of {self.tokens} tokens, {self.labels} of them learned; {self.truncated} rows truncated "
            f"({self.lost} tokens lost), {self.masked} rows with nothing to learn"
        )


def check_dataset(
    dataset: Any, trainer: Any = None, max_length: int | None = None, name: str = "train"
) -> DatasetCounts:
    """Counts what a trainer will truncate and mask, and raises DatasetError where nothing is left to learn from.

    dataset: of rows with `input_ids` (and `labels` or TRL's masks), or of text or messages with the SFTTrainer that
    was made for it, whose own preparation then tokenises them and whose config gives `max_length`. Without a trainer
    such rows are only checked for being there at all. Call it before `trainer.train()`; it changes neither.
    Truncated and masked rows are also logged as a warning, which names the dataset by `name`.
    """
    if dataset is None:
        raise DatasetError(f"the {name} dataset is None; give one with at least one row")
    first = next(iter(dataset), None)
    if first is None:
        raise DatasetError(f"the {name} dataset is empty; give one with at least one row")
    if not hasattr(dataset, "__len__"):
        return DatasetCounts(rows=None)
    if trainer is not None:
        max_length = _cut_of(trainer.args)
        dataset = tokenized(dataset, trainer, name)
    elif "input_ids" not in first:
        return DatasetCounts(rows=len(dataset))
    counts = _count(dataset, max_length)
    if not counts.labels:
        where = f" after truncation to max_length={max_length}" if counts.truncated else ""
        raise DatasetError(
            f"the {name} dataset has no label to learn{where}: all {counts.rows} rows are masked. Check the prompt or "
            "assistant mask against the chat template, or raise max_length"
        )
    if counts.truncated or counts.masked:
        logger.warning("%s dataset: %s", name, counts)
    return counts


def _cut_of(args: Any) -> int | None:
    """The length at which the trainer cuts rows; packing other than best-fit splits long rows instead."""
    splits = getattr(args, "packing", False) and args.packing_strategy != "bfd"
    return None if splits else getattr(args, "max_length", None)


def tokenized(dataset: Any, trainer: Any, name: str) -> Any:
    """The dataset with `input_ids` and `labels`, uncut, by the trainer's own preparation."""
    first = next(iter(dataset))
    if "input_ids" in first:
        return dataset
    prepare = getattr(trainer, "_prepare_dataset", None)
    if prepare is None:
        raise DatasetError(
            f"the {name} dataset has columns {sorted(first)} and {type(trainer).__name__} does not tokenise; give rows "
            "with input_ids and labels"
        )
    uncut = copy.copy(trainer.args)
    uncut.max_length = None
    return prepare(dataset, trainer.processing_class, uncut, False, trainer._formatting_func, name)


def _count(rows: Iterable[Mapping[str, Any]], max_length: int | None) -> DatasetCounts:
    total = truncated = lost = masked = tokens = labels = 0
    for row in rows:
        length = len(row["input_ids"])
        kept = length if max_length is None else min(length, max_length)
        learned = sum(_learns(row)[1:kept])  # nothing predicts the first token
        total += 1
        truncated += kept < length
        lost += length - kept
        masked += learned == 0
        tokens += kept
        labels += learned
    return DatasetCounts(total, truncated, lost, masked, tokens, labels)


def _learns(row: Mapping[str, Any]) -> Sequence[bool]:
    """For each token of a row, whether its label counts."""
    if "labels" in row:
        return [int(label) != IGNORED for label in row["labels"]]
    masks = [row[mask] for mask in MASKS if mask in row]
    return [all(bits) for bits in zip(*masks, strict=True)] if masks else [True] * len(row["input_ids"])
