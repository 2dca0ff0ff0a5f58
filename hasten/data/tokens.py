"""Tokenises a dataset as its trainer does."""

import copy
from typing import Any

from hasten.errors import DatasetError


def tokenized(dataset: Any, trainer: Any, name: str) -> Any:
    """Returns the dataset with `input_ids` and `labels`, not truncated, as TRL's SFTTrainer prepares it.

    A dataset that has `input_ids` is returned unchanged. Raises DatasetError for a trainer that does not tokenise.
    """
    first = next(iter(dataset))
    if "input_ids" in first:
        return dataset
    prepare = getattr(trainer, "_prepare_dataset", None)
    if prepare is None:
        raise DatasetError(
            f"the {name} dataset has columns {sorted(first)} and {type(trainer).__name__} does not tokenise; pass "
            "examples with input_ids and labels"
        )
    uncut = copy.copy(trainer.args)
    uncut.max_length = None
    return prepare(dataset, trainer.processing_class, uncut, False, trainer._formatting_func, name)
