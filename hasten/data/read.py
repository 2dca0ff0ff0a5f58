"""Reads datasets from files, folders and the hub, with the columns that TRL's SFTTrainer takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.data.columns import select_columns
from hasten.data.json_lines import check_json
from hasten.errors import DatasetError, MissingExtraError, OptionError
from hasten.json_file import shown
from hasten.options.data import DataOptions, data_problems

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""File suffix -> the builder of the package `datasets` for it."""


def read_dataset(options: DataOptions) -> "tuple[Dataset, Dataset | None]":
    """Returns the training examples, and the evaluation examples if `options` asks for some.

    Chats come as `messages` of role and content, ShareGPT's rows too. Raises OptionError for options of another type,
    DatasetError for a dataset that cannot be read, is empty, has none of `columns.COLUMNS`, or has cells that cannot be
    trained on (rows are named), and MissingExtraError without the package `datasets`.
    """
    if problems := data_problems(options):
        raise OptionError("data", problems)
    train = _read(options, options.path, options.split)
    if options.eval_path is None and options.eval_split is None:
        return train, None
    return train, _read(options, options.eval_path or options.path, options.eval_split or "train")


def _read(options: DataOptions, path: str, split: str) -> "Dataset":
    try:
        from datasets import exceptions
    except ImportError as error:
        raise MissingExtraError("hasten train", "datasets", "train") from error
    try:
        dataset = _open(options, path, split)
    except DatasetError:
        raise
    except Exception as error:  # a file that others wrote: whichever line of the parsers stumbles over it
        reason = error.__cause__ if isinstance(error, exceptions.DatasetsError) and error.__cause__ else error
        raise DatasetError(
            f"{path} (split {split!r}) cannot be read: {shown(reason)}. Pass a .jsonl, .json, .parquet or .csv file, a folder "
            "saved by datasets, or a hub id"
        ) from error
    if not len(dataset):
        raise DatasetError(f"{path} (split {split!r}) is empty; pass a dataset with at least one example")
    return select_columns(dataset, options.text_field, path)


def _open(options: DataOptions, path: str, split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    place = Path(path)
    if place.is_file():
        if place.suffix not in READERS:
            raise DatasetError(f"{path} ends in {place.suffix!r}; it must end in one of {', '.join(READERS)}")
        if not place.stat().st_size:
            raise DatasetError(f"{path} is empty; pass a dataset with at least one example")
        settings: dict[str, Any] = {}
        if READERS[place.suffix] == "json":
            check_json(path)
        elif place.suffix == ".csv":
            settings = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are text, an empty cell is empty
        return load_dataset(READERS[place.suffix], data_files={"train": path}, split=split, **settings)
    if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
        saved = load_from_disk(path)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(path, options.name, revision=options.revision, split=split)
