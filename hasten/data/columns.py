"""Chooses the columns of a dataset that are trained on, and checks every row of them."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from hasten.data.chat import RowError, prompt_messages, to_messages
from hasten.errors import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

Check: TypeAlias = Callable[[Any], list[dict[str, Any]]]
"""A row of a chat -> its messages in the spelling of chat templates. Raises RowError."""

COLUMNS = (("input_ids", "labels"), ("messages",), ("conversations",), ("prompt", "completion"), ("text",))
"""Columns that can be trained on; the first entry that a dataset has is used."""
CHAT_COLUMNS = ("tools", "chat_template_kwargs")
"""Further columns that TRL reads with a chat, where a dataset has them."""
REFUSED_BESIDE_CHAT = {
    "system": "put it into the messages, as the first one",
    "system_prompt": "put it into the messages, as the first one",
    "images": "only text can be trained on",
    "image": "only text can be trained on",
    "videos": "only text can be trained on",
    "audio": "only text can be trained on",
    "audios": "only text can be trained on",
}
"""Columns that other trainers put into a chat -> what to do; left out, the model would learn something else."""
INSTEAD = (
    (
        {"instruction", "output"},
        "these are Alpaca's columns, and hasten chooses no prompt for them: write messages such as "
        '[{"role": "user", "content": instruction + "\\n\\n" + input}, {"role": "assistant", "content": output}]',
    ),
    ({"chosen", "rejected"}, "these are preferences, for TRL's DPOTrainer"),
    (
        {"question", "answer"},
        'write messages such as [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]',
    ),
)
"""Columns of well-known formats that are not read -> what to do."""
SHOWN = 5


def select_columns(dataset: "Dataset", text_field: str | None, path: str) -> "Dataset":
    """Returns the columns that are trained on, since TRL chooses the dataset's format by the columns that exist; chats
    as `messages` of role and content.

    The others are named in the log. Raises DatasetError, which names rows, for columns and cells that cannot be trained
    on as they are.
    """
    asked = ((text_field,),) if text_field else COLUMNS
    names = dataset.column_names
    found = next((columns for columns in asked if set(columns) <= set(names)), None)
    if found is None:
        wanted = " or ".join(" + ".join(columns) for columns in asked)
        known = next((f". {instead}" for columns, instead in INSTEAD if columns <= set(names)), "")
        raise DatasetError(
            f"{path} has the columns {', '.join(names)}; it needs {wanted}, or set data.text_field to the "
            f"column of text{known}"
        )
    for column in found:
        if missing := dataset.data.column(column).null_count:
            raise DatasetError(f"{path}: {missing} examples have an empty {column!r}; fill or remove them")
    chat = found[0] in ("messages", "conversations") or (found[0] == "prompt" and not _is_text(dataset, "prompt"))
    beside = [name for name in names if name in REFUSED_BESIDE_CHAT] if chat else []
    if beside:
        lines = "; ".join(f"{name!r}: {REFUSED_BESIDE_CHAT[name]}" for name in beside)
        raise DatasetError(
            f"{path} has columns beside {found[0]!r} that would be ignored. {lines}, or remove the column"
        )
    kept = [*found, *(name for name in CHAT_COLUMNS if name in names)]
    ignored = [name for name in names if name not in kept]
    if ignored:
        log.warning("%s: trains on %s; ignored columns: %s", path, ", ".join(kept), ", ".join(ignored))
    return _checked(dataset.select_columns(kept), found, path)


def check_rows(dataset: Any, name: str) -> None:
    """Raises DatasetError for chats that a trainer would take for something else, ShareGPT's included: a trainer that is
    given them directly keeps their names of roles."""
    names = getattr(dataset, "column_names", None) or ()
    column = next((c for c in ("messages", "conversations") if c in names), None)
    if column is None or "input_ids" in names:
        return
    for number, row in enumerate(dataset[column], 1):
        try:
            to_messages(row)
            if any("from" in message for message in row):
                raise RowError(
                    "is in ShareGPT's format (from and value), whose names of roles the trainer would keep; convert it "
                    "with hasten.data.to_messages"
                )
        except RowError as error:
            raise DatasetError(f"the {name} dataset, row {number}, {error}") from error


def _checked(dataset: "Dataset", columns: tuple[str, ...], path: str) -> "Dataset":
    first = columns[0]
    if first in ("messages", "conversations"):
        return _converted(dataset, {first: ("messages", to_messages)}, path)
    if first == "input_ids":
        _check_ids(dataset, path)
        return dataset
    if first == "prompt" and not _is_text(dataset, "prompt"):
        rules = {"prompt": ("prompt", prompt_messages), "completion": ("completion", to_messages)}
        return _converted(dataset, rules, path)
    for column in columns:
        if not _is_text(dataset, column):
            kind = getattr(dataset.features[column], "dtype", dataset.features[column])
            raise DatasetError(
                f"{path}: the column {column!r} is of type {kind}, and must be text. Write its values as text, in quotes"
            )
    if "completion" in columns:
        _collect(path, ((n, "has an empty completion") for n, one in enumerate(dataset["completion"], 1) if not one))
    return dataset


def _converted(dataset: "Dataset", rules: Mapping[str, tuple[str, Check]], path: str) -> "Dataset":
    """Returns the dataset with checked columns of chats, renamed, and converted where a row is in ShareGPT's format.

    rules: column -> (new name, the check).
    """
    problems = []
    for column, (new, check) in rules.items():
        changed, keys = False, set()
        for number, row in enumerate(dataset[column], 1):
            try:
                made = check(row)
            except RowError as error:
                problems.append((number, f"{error}" if len(rules) == 1 else f"{column}: {error}"))
                continue
            changed = changed or any("from" in message for message in row)
            keys |= {key for message in made for key in message}
        if changed and not problems:
            dataset = _rewritten(dataset, column, new, check, keys)
        elif column != new and not problems:
            dataset = dataset.rename_column(column, new)
    _collect(path, problems)
    return dataset


def _rewritten(dataset: "Dataset", column: str, new: str, check: Check, keys: set[str]) -> "Dataset":
    """Converts a column row by row, into a file of the cache of `datasets`."""
    from datasets import Features, Json, List, Value

    # Without the columns of a struct a message keeps its own keys: those of other messages would else be there as None.
    message = {"role": Value("string"), "content": Value("string")} if keys <= {"role", "content"} else Json()
    others = {name: kind for name, kind in dataset.features.items() if name != column}
    return dataset.map(
        lambda row: {new: check(row[column])},
        remove_columns=[column],
        features=Features({**others, new: List(message)}),
    )


def _check_ids(dataset: "Dataset", path: str) -> None:
    problems = []
    for number, (ids, labels) in enumerate(zip(dataset["input_ids"], dataset["labels"], strict=True), 1):
        for name, values in (("input_ids", ids), ("labels", labels)):
            if not isinstance(values, list) or not all(type(one) is int for one in values):
                problems.append((number, f"has {name} that are not a list of integers"))
            elif name == "input_ids" and any(one < 0 for one in values):
                problems.append((number, "has negative input_ids"))
        if isinstance(ids, list) and isinstance(labels, list) and len(ids) != len(labels):
            problems.append((number, f"has {len(ids)} input_ids and {len(labels)} labels"))
    _collect(path, problems)


def _collect(path: str, problems: Any) -> None:
    found = list(problems)
    if not found:
        return
    more = f"\n  - and {len(found) - SHOWN} more rows" if len(found) > SHOWN else ""
    lines = "".join(f"\n  - row {number} {problem}" for number, problem in found[:SHOWN])
    raise DatasetError(f"{path}: {len({n for n, _ in found})} rows cannot be trained on as they are:{lines}{more}")


def _is_text(dataset: "Dataset", column: str) -> bool:
    return getattr(dataset.features[column], "dtype", None) in ("string", "large_string")
