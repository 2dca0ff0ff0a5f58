"""Finds the tokens of an example that have a label."""

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.ops import ScoreConfig

IGNORE_INDEX = ScoreConfig.ignore_index
"""The label that the loss ignores, as in torch's cross entropy and TRL."""
MASKS = ("completion_mask", "assistant_masks")
"""TRL's columns of 0 and 1, one per token, that it converts to labels."""


def label_mask(example: Mapping[str, Any]) -> Sequence[bool]:
    """Returns for each token of a tokenised example whether it has a label: by `labels`, else by TRL's masks, else
    always."""
    if "labels" in example:
        return [int(label) != IGNORE_INDEX for label in example["labels"]]
    masks = [example[mask] for mask in MASKS if mask in example]
    return [all(bits) for bits in zip(*masks, strict=True)] if masks else [True] * len(example["input_ids"])
