"""Rows to train on, from files, folders and the hub, in the columns that TRL's SFTTrainer takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import DatasetError, MissingExtraError
from hasten.training.config import DataOptions
from hasten.training.trainer import tokenized

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SHAPES = (("input_ids", "labels"), ("messages",), ("conversations",), ("prompt", "completion"), ("text",))
BESIDE = ("tools", "chat_template_kwargs")
"""Columns that TRL reads beside a chat, where a dataset has them."""


def read_rows(options: DataOptions) -> "tuple[Dataset, Dataset | None]":
    """The rows to train on, and those to evaluate on where `options` asks for some.

    Raises DatasetError for what cannot be read, is empty, holds empty cells, or has none of `SHAPES`.
    """
    train = _read(options, options.path, options.split)
    if options.eval_path is None and options.eval_split is None:
        return train, None
    return train, _read(options, options.eval_path or options.path, options.eval_split or "train")


def drop_long(trainer: Any, rows: "Dataset", limit: int, name: str = "train") -> None:
    """Gives `trainer` those of `rows` that have at most `limit` tokens, in place of all of them cut to that length."""
    short = tokenized(rows, trainer, name).filter(lambda row: len(row["input_ids"]) <= limit)
    if not len(short):
        raise DatasetError(
            f"all {len(rows)} rows of the {name} dataset are longer than max_seq_length={limit}, and too_long is "
            "'drop'; raise model.max_seq_length, or use too_long: truncate"
        )
    trainer.train_dataset = trainer._prepare_dataset(
        short, trainer.processing_class, trainer.args, trainer.args.packing, None, name
    )


def _read(options: DataOptions, path: str, split: str) -> "Dataset":
    try:
        from datasets import exceptions
    except ImportError as error:
        raise MissingExtraError("hasten train", "datasets", "train") from error
    try:
        rows = _open(options, path, split)
    except DatasetError:
        raise
    except (exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise DatasetError(
            f"{path} (split {split!r}) cannot be read: {error}. Give a .jsonl, .json, .parquet or .csv file, a folder "
            "saved by datasets, or a hub id"
        ) from error
    if not len(rows):
        raise DatasetError(f"{path} (split {split!r}) is empty; give a dataset with at least one row")
    return _shaped(rows, options, path)


def _open(options: DataOptions, path: str, split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    place = Path(path)
    if place.is_file():
        if place.suffix not in READERS:
            raise DatasetError(f"{path} ends in {place.suffix!r}; known are {', '.join(READERS)}")
        if not place.stat().st_size:
            raise DatasetError(f"{path} is empty; give a dataset with at least one row")
        return load_dataset(READERS[place.suffix], data_files={"train": path}, split=split)
    if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
        saved = load_from_disk(path)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(path, options.name, revision=options.revision, split=split)


def _shaped(rows: "Dataset", options: DataOptions, path: str) -> "Dataset":
    """Only the columns that are trained on, so that TRL does not choose by others that happen to be there."""
    asked = ((options.text_field,),) if options.text_field else SHAPES
    found = next((shape for shape in asked if set(shape) <= set(rows.column_names)), None)
    if found is None:
        wanted = " or ".join(" + ".join(shape) for shape in asked)
        raise DatasetError(f"{path} has the columns {', '.join(rows.column_names)}; needed: {wanted}. See text_field")
    for column in found:
        if missing := rows.data.column(column).null_count:
            raise DatasetError(f"{path}: {missing} rows have nothing in {column!r}; fill or remove them")
    return rows.select_columns([*found, *(name for name in BESIDE if name in rows.column_names)])
