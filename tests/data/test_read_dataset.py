"""`read_dataset`: which columns are kept, which files are refused. Each kind of file is trained on in tests/cli/test_train."""

import json
from pathlib import Path
from typing import Any

import pytest

from hasten.data import read_dataset
from hasten.errors import DatasetError
from hasten.options import DataOptions


def jsonl(folder: Path, examples: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return str(path)


def test_only_the_columns_that_are_trained_on_are_kept(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path, [{"text": "t", "messages": chat, "tools": [], "source": "x"}] * 4)
    assert read_dataset(DataOptions(path))[0].column_names == ["messages", "tools"]
    assert read_dataset(DataOptions(path, text_field="source"))[0].column_names == ["source", "tools"]


def test_splits_and_files_for_evaluation(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": str(i)} for i in range(8)])
    other = jsonl(tmp_path, [{"text": "held out"}], "other.jsonl")
    train, evaluation = read_dataset(DataOptions(path, split="train[:6]", eval_split="train[6:]"))
    assert len(train) == 6 and evaluation is not None and evaluation["text"][:] == ["6", "7"]
    assert read_dataset(DataOptions(path))[1] is None
    _, evaluation = read_dataset(DataOptions(path, eval_path=other))
    assert evaluation is not None and evaluation["text"][:] == ["held out"]


def test_files_that_cannot_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(DatasetError, match="must end in one of .jsonl"):
        read_dataset(DataOptions(str(tmp_path / "data.txt")))
    with pytest.raises(DatasetError, match="data.text_field"):
        read_dataset(DataOptions(jsonl(tmp_path, [{"question": "a"}])))
    with pytest.raises(DatasetError, match="1 examples have an empty 'text'"):
        read_dataset(DataOptions(jsonl(tmp_path, [{"text": "a"}, {"text": None}])))


@pytest.mark.parametrize("column", ["messages", "conversations", "input_ids"])
@pytest.mark.parametrize("where", [[0], [1, 3], [0, 1, 2, 3]])
def test_an_empty_list_is_named_with_its_example(tmp_path: Path, column: str, where: list[int]) -> None:
    full = (
        [1, 2] if column == "input_ids" else [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    )
    rows = [
        {column: [] if n in where else full, **({"labels": [1, 2]} if column == "input_ids" else {})} for n in range(4)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DatasetError, match="(?s)" + ".*".join(rf"row {n + 1} " for n in where)):
        read_dataset(DataOptions(str(path)))
