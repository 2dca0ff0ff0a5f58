"""Reads datasets from files, folders and the hub, with the columns that TRL's SFTTrainer takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import DatasetError, MissingExtraError
from hasten.options.data import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""File suffix -> the builder of the package `datasets` for it."""
COLUMNS = (("input_ids", "labels"), ("messages",), ("conversations",), ("prompt", "completion"), ("text",))
"""Columns that can be trained on; the first entry that a dataset has is used."""
CHAT_COLUMNS = ("tools", "chat_template_kwargs")
"""Further columns that TRL reads with a chat, where a dataset has them."""


def read_dataset(options: DataOptions) -> "tuple[Dataset, Dataset | None]":
    """Returns the training examples, and the evaluation examples if `options` asks for some.

    Raises DatasetError for a dataset that cannot be read, is empty, has empty cells, or has none of `COLUMNS`, and
    MissingExtraError without the package `datasets`.
    """
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
    except (exceptions.DatasetsError, OSError, ValueError, KeyError) as error:
        raise DatasetError(
            f"{path} (split {split!r}) cannot be read: {error}. Pass a .jsonl, .json, .parquet or .csv file, a folder "
            "saved by datasets, or a hub id"
        ) from error
    if not len(dataset):
        raise DatasetError(f"{path} (split {split!r}) is empty; pass a dataset with at least one example")
    return _select_columns(dataset, options, path)


def _open(options: DataOptions, path: str, split: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    place = Path(path)
    if place.is_file():
        if place.suffix not in READERS:
            raise DatasetError(f"{path} ends in {place.suffix!r}; it must end in one of {', '.join(READERS)}")
        if not place.stat().st_size:
            raise DatasetError(f"{path} is empty; pass a dataset with at least one example")
        return load_dataset(READERS[place.suffix], data_files={"train": path}, split=split)
    if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
        saved = load_from_disk(path)
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(path, options.name, revision=options.revision, split=split)


def _select_columns(dataset: "Dataset", options: DataOptions, path: str) -> "Dataset":
    """Keeps only the columns that are trained on, since TRL chooses the dataset's format by the columns that exist."""
    asked = ((options.text_field,),) if options.text_field else COLUMNS
    found = next((columns for columns in asked if set(columns) <= set(dataset.column_names)), None)
    if found is None:
        wanted = " or ".join(" + ".join(columns) for columns in asked)
        raise DatasetError(
            f"{path} has the columns {', '.join(dataset.column_names)}; it needs {wanted}, or set data.text_field to the "
            "column of text"
        )
    for column in found:
        if missing := dataset.data.column(column).null_count:
            raise DatasetError(f"{path}: {missing} examples have an empty {column!r}; fill or remove them")
        if empty := _empty_lists(dataset, column):
            listed = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            raise DatasetError(
                f"{path}: {column!r} is an empty list in {len(empty)} examples (numbers {listed}, counted from 0); fill or "
                "remove them"
            )
    return dataset.select_columns([*found, *(name for name in CHAT_COLUMNS if name in dataset.column_names)])


def _empty_lists(dataset: "Dataset", column: str) -> list[int]:
    """The numbers of the examples whose `column` holds a list without elements."""
    import pyarrow
    from pyarrow import compute

    found = []
    number = 0
    table: Any
    for table in dataset.select_columns([column]).with_format("arrow").iter(1000):
        cells = table.column(column)
        if not (pyarrow.types.is_list(cells.type) or pyarrow.types.is_large_list(cells.type)):
            return []
        lengths = compute.list_value_length(cells).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        found += [number + index for index, length in enumerate(lengths) if length == 0]
        number += len(lengths)
    return found
