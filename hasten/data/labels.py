"""Which tokens of an example the loss counts."""

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.ops import ScoreConfig

IGNORE_INDEX = ScoreConfig.ignore_index
"""The label of a token that the loss leaves out, as torch's cross entropy and TRL have it."""
MASKS = ("completion_mask", "assistant_masks")
"""TRL's columns of 0 and 1, one per token, from which it makes labels."""


def label_mask(example: Mapping[str, Any]) -> Sequence[bool]:
    """For each token of a tokenised example, whether it has a label: from `labels`, else from TRL's masks, else all."""
    if "labels" in example:
        return [int(label) != IGNORE_INDEX for label in example["labels"]]
    masks = [example[mask] for mask in MASKS if mask in example]
    return [all(bits) for bits in zip(*masks, strict=True)] if masks else [True] * len(example["input_ids"])
