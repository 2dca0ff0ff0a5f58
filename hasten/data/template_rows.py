"""Finds the row that a chat template refuses."""

from collections.abc import Mapping
from typing import Any

from hasten.errors import DatasetError
from hasten.json_file import shown


def refuse_rows(tokenizer: Any, datasets: Mapping[str, Any]) -> None:
    """Raises DatasetError that names the first row whose chat the tokenizer's template cannot render, such as two turns
    of the user where the template wants them to alternate. Called after a trainer has failed: it renders every row.

    datasets: name -> rows with `messages`, or with a `prompt` and `completion` of messages; None = no such dataset.
    """
    for name, dataset in datasets.items():
        columns = getattr(dataset, "column_names", None) or ()
        if "messages" not in columns and not {"prompt", "completion"} <= set(columns):
            continue
        for number, row in enumerate(dataset, 1):
            chat = row["messages"] if "messages" in columns else _joined(row["prompt"], row["completion"])
            if chat is None:
                break
            try:
                tokenizer.apply_chat_template(
                    chat, tools=row.get("tools"), tokenize=False, **(row.get("chat_template_kwargs") or {})
                )
            except Exception as error:  # the template is foreign code: whatever it raises is its answer to this row
                raise DatasetError(
                    f"the {name} dataset, row {number}: the tokenizer's chat template refuses its messages "
                    f"({shown(error)}). Correct or remove the row"
                ) from error


def _joined(prompt: Any, completion: Any) -> list[Any] | None:
    return [*prompt, *completion] if isinstance(prompt, list) and isinstance(completion, list) else None
