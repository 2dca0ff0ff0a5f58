"""The `data` and `save` sections of a training job."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hasten.suggest import did_you_mean

TooLong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True)
class DataOptions:
    """path: a .jsonl, .json, .parquet or .csv file, a folder saved by `datasets`, or a hub id (`name`: its config).

    split, eval_split: as `datasets` spells them ("train", "train[:90%]"). eval_path: a second file for evaluation.
    text_field: the column of plain text to train on. Without it the columns decide: `messages` or `conversations` (chat),
    `prompt` and `completion`, or `text`. too_long: what to do with examples longer than max_seq_length: "truncate" (counted and
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


OPTIONAL = ("name", "revision", "eval_path", "eval_split", "text_field")


def data_problems(options: DataOptions) -> list[str]:
    """Returns a problem for each option of another type, or that is none of its choices."""
    found = [
        f"{name}={value!r}: must be text{'' if needed else ' or None'}"
        for name, needed in (("path", True), ("split", True), *((n, False) for n in OPTIONAL))
        if not _is_text(value := getattr(options, name), needed)
    ]
    choices = get_args(TooLong)
    if options.too_long not in choices:
        found.append(
            f"too_long={options.too_long!r}: must be one of {', '.join(choices)}{did_you_mean(options.too_long, choices)}"
        )
    return found


def _is_text(value: Any, needed: bool) -> bool:
    return (value is None and not needed) or (isinstance(value, str | Path) and bool(str(value).strip()))
