"""The `data` and `save` sections of a training job."""

from dataclasses import dataclass
from typing import Literal

TooLong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True)
class DataOptions:
    """path: a .jsonl, .json, .parquet or .csv file, a folder saved by `datasets`, or a hub id (`name`: its config).

    split, eval_split: as `datasets` spells them ("train", "train[:90%]"). eval_path: a second file for evaluation.
    text_field: the column of plain text to train on. Without it the columns decide: `messages` (chat), `prompt` and
    `completion`, or `text`. too_long: what to do with examples longer than max_seq_length: "truncate" (counted and
    reported), "drop" (likewise), or "error".
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None
    text_field: str | None = None
    too_long: TooLong = "truncate"


@dataclass(frozen=True)
class SaveOptions:
    """method: as in `save_pretrained_merged`; None = "lora" with an adapter, "merged_16bit" without.

    folder: default: `model` in the run's output folder.
    """

    method: str | None = None
    folder: str | None = None
