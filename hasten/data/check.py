"""Counts what training will see of a dataset, before step 1: examples, truncated tokens, labels."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hasten.data.columns import check_rows
from hasten.data.labels import label_mask
from hasten.data.tokens import tokenized
from hasten.errors import DatasetError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetCounts:
    """What training will see of a dataset. All fields except `examples` are None if the dataset is not tokenised yet,
    and `examples` too if it is a stream.

    truncated: examples that are truncated. lost: tokens that truncation removes. masked: examples without a label after
    it. tokens, labels: tokens that are left, and how many of them have a label.
    """

    examples: int | None
    truncated: int | None = None
    lost: int | None = None
    masked: int | None = None
    tokens: int | None = None
    labels: int | None = None

    def __str__(self) -> str:
        if self.examples is None:
            return "a stream of examples, not counted"
        if self.truncated is None:
            return f"{self.examples} examples, not counted"
        return (
            f"{self.examples} examples, {self.tokens} tokens, {self.labels} of them with a label; {self.truncated} examples "
            f"truncated ({self.lost} tokens lost), {self.masked} examples without a label"
        )


def check_dataset(
    dataset: Any, trainer: Any = None, max_length: int | None = None, name: str = "train"
) -> DatasetCounts:
    """Counts what a trainer will truncate and mask, and raises DatasetError where no label is left to learn from.

    dataset: of examples with `input_ids` (and `labels` or TRL's masks), or of text or messages together with the
    SFTTrainer that was made for it, whose own preparation then tokenises them and whose config gives `max_length`.
    Without a trainer such examples are not counted, only checked to exist. Call it before `trainer.train()`; it changes
    neither dataset nor trainer. Truncated and masked examples are also logged as a warning, which names the dataset by
    `name`.
    """
    if dataset is None:
        raise DatasetError(f"the {name} dataset is None; pass one with at least one example")
    first = next(iter(dataset), None)
    if first is None:
        raise DatasetError(f"the {name} dataset is empty; pass one with at least one example")
    if not hasattr(dataset, "__len__"):
        return DatasetCounts(examples=None)
    check_rows(dataset, name)
    if trainer is not None:
        max_length = _truncation_length(trainer.args)
        dataset = tokenized(dataset, trainer, name)
    elif "input_ids" not in first:
        return DatasetCounts(examples=len(dataset))
    counts = _count(dataset, max_length)
    if not counts.labels:
        where = f" after truncation to max_length={max_length}" if counts.truncated else ""
        raise DatasetError(
            f"the {name} dataset has no label to learn from{where}: all {counts.examples} examples are masked. Check the "
            "prompt or assistant mask against the chat template, or raise max_length"
        )
    if counts.truncated or counts.masked:
        logger.warning("%s dataset: %s", name, counts)
    return counts


def _truncation_length(args: Any) -> int | None:
    """Returns the length to which the trainer truncates; packing other than best-fit splits long examples instead."""
    splits = getattr(args, "packing", False) and args.packing_strategy != "bfd"
    return None if splits else getattr(args, "max_length", None)


def _count(dataset: Iterable[Mapping[str, Any]], max_length: int | None) -> DatasetCounts:
    total = truncated = lost = masked = tokens = labels = 0
    for example in dataset:
        length = len(example["input_ids"])
        kept = length if max_length is None else min(length, max_length)
        learned = sum(label_mask(example)[1:kept])  # no position predicts the first token
        total += 1
        truncated += kept < length
        lost += length - kept
        masked += learned == 0
        tokens += kept
        labels += learned
    return DatasetCounts(total, truncated, lost, masked, tokens, labels)
