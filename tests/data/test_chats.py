"""Chats in every spelling give the token ids of `messages`; what would train on something else is refused by row."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hasten.data import check_dataset, read_dataset, refuse_rows
from hasten.errors import DatasetError, OptionError
from hasten.options import DataOptions
from hasten.testing import tiny_model, tiny_tokenizer

CHAT = [
    ("system", "be brief"),
    ("user", "what is it?"),
    ("assistant", "a call"),
    ("tool", "42"),
    ("assistant", "it is 42"),
]
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]
TURNS = [{"from": SHAREGPT[role], "value": content} for role, content in CHAT]


def rows_of(folder: Path, *rows: Any, name: str = "rows.jsonl", **options: Any) -> Dataset:
    (folder / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return read_dataset(DataOptions(str(folder / name), **options))[0]


def refusal(folder: Path, *rows: Any, **options: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        rows_of(folder, *rows, **options)
    return str(caught.value)


def token_ids(dataset: Dataset, folder: Path) -> list[list[int]]:
    config = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none")
    model = tiny_model("llama", num_hidden_layers=1)
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tiny_tokenizer())
    return [list(ids) for ids in trainer.train_dataset["input_ids"]]


def test_every_spelling_of_a_chat_gives_the_same_token_ids(tmp_path: Path) -> None:
    expected = token_ids(rows_of(tmp_path, *[{"messages": MESSAGES}] * 2), tmp_path)
    assert tiny_tokenizer().decode(expected[0]).startswith("<|bos|><|system|>be brief<|end|><|user|>")
    for row in ({"conversations": MESSAGES}, {"conversations": TURNS}, {"messages": TURNS}):
        assert token_ids(rows_of(tmp_path, row, row), tmp_path) == expected
    mixed = rows_of(tmp_path, {"conversations": TURNS}, {"conversations": MESSAGES})
    assert token_ids(mixed, tmp_path) == expected
    within = rows_of(tmp_path, *[{"conversations": [*TURNS[:2], *MESSAGES[2:]]}] * 2)
    assert token_ids(within, tmp_path) == expected


@pytest.mark.parametrize(("speaker", "role"), [("function_call", "assistant"), ("function_response", "tool")])
def test_calls_and_results_of_functions_have_a_role(tmp_path: Path, speaker: str, role: str) -> None:
    row = {"conversations": [*TURNS[:2], {"from": speaker, "value": '{"name": "f"}'}, TURNS[-1]]}
    assert rows_of(tmp_path, row)["messages"][0][2] == {"role": role, "content": '{"name": "f"}'}


USER, ANSWER = MESSAGES[1], MESSAGES[-1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "row 2 has no message"),
        (None, "1 examples have an empty"),
        ("hello", "row 2 has text in place of a list"),
        ([USER], "nothing to learn"),
        ([USER, {"role": "assistant", "content": None}], r"message 2 (assistant) has nothing as content"),
        ([USER, {"role": "assistant"}], "message 2"),
        ([USER, {"role": "assistant", "content": 5}], "has a number as content"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "only text can be trained on"),
        ([{"content": "x"}, ANSWER], "has the role None"),
        ([{"role": "User", "content": "x"}, ANSWER], "did you mean user?"),
        ([{"role": " user", "content": "x"}, ANSWER], "did you mean user?"),
        ([{"role": "human", "content": "x"}, ANSWER], "did you mean user?"),
        ([{"role": "narrator", "content": "x"}, ANSWER], "'narrator'"),
        ([{"from": "Human", "value": "x"}, TURNS[-1]], "did you mean human"),
        ([{"from": "bing", "value": "x"}, TURNS[-1]], "'bing'"),
        ([{"from": "human", "value": None}, TURNS[-1]], "has nothing as content"),
        ([{"from": "human", "content": "x"}, TURNS[-1]], "keep role and content, or from and value"),
        ([USER, {**ANSWER, "weight": 0}], "weight, which the loss would ignore"),
        ([USER, "a string", ANSWER], "message 2 is text"),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_row_that_would_train_on_something_else_is_named(tmp_path: Path, row: Any, said: str, column: str) -> None:
    assert said in refusal(tmp_path, {column: MESSAGES}, {column: row}, {column: MESSAGES})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a", "input": "", "output": "b"}], "Alpaca"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preferences"),
        ([{"question": "a", "answer": "b"}], "write messages"),
        ([{"text": "a"}, {"messages": MESSAGES}], "empty 'messages'"),
        ([{"text": 5}], "must be text"),
        ([{"text": "2020-01-01"}], "must be text"),
        ([{"text": ["a"]}], "must be text"),
        ([{"prompt": "a", "completion": 4}], "'completion' is of type int64"),
        ([{"prompt": "a", "completion": ""}], "row 1 has an empty completion"),
        ([{"prompt": "a", "completion": None}], "empty 'completion'"),
        ([{"prompt": "a", "completion": MESSAGES}], "must be text"),
        ([{"prompt": [USER], "completion": [USER]}], "completion: has no message of the assistant"),
        ([{"messages": MESSAGES, "system": "be rude"}], "put it into the messages"),
        ([{"messages": MESSAGES, "images": ["x.png"]}], "only text"),
        ([{"input_ids": [1, 2], "labels": [1]}], "has 2 input_ids and 1 labels"),
        ([{"input_ids": [1, -2], "labels": [1, 2]}], "negative"),
        ([{"input_ids": [1, 2.5], "labels": [1, 2]}], "not a list of integers"),
        (['{"text": "a"}', '{"text": '], "line 2: it is not readable as JSON"),
        (['{"text": "a"}', '{"text": "b", "text": "c"}'], "line 2: the key 'text' occurs twice"),
        (
            ['{"messages": [{"role": "user", "content": "a", "content": "b"}]}'],
            "line 1: the key 'content' occurs twice",
        ),
        (["[1]", "[2]"], "rows.jsonl"),
        (["1", "2"], "line 1: a row must be an object"),
        ([{"text": "a"}, "3"], "line 2: a row must be an object"),
        ([{"text": "a"}, '{"text": "\\ud800"}'], "line 2"),
    ],
)
def test_columns_and_lines_that_cannot_be_trained_on(tmp_path: Path, rows: list[Any], said: str) -> None:
    assert said in refusal(tmp_path, *rows)


def test_cells_of_a_csv_are_text_as_written(tmp_path: Path) -> None:
    assert rows_of(tmp_path, "text", "None", "NA", "hello", name="a.csv")["text"][:] == ["None", "NA", "hello"]
    assert "empty 'completion'" in refusal(tmp_path, "prompt,completion", "a,b", "c,", name="b.csv")
    assert "must be text" in refusal(tmp_path, "prompt,completion", "1+1,2", "2+2,4", name="c.csv")


def test_ignored_columns_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows_of(tmp_path, {"messages": MESSAGES, "text": "x", "source": "y"})
    assert "trains on messages; ignored columns: text, source" in caplog.text


def test_chats_that_need_no_change_stay_on_disk(tmp_path: Path) -> None:
    assert rows_of(tmp_path, {"messages": MESSAGES}).cache_files


def test_tool_calls_need_no_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    rows = rows_of(tmp_path, {"conversations": [USER, call, ANSWER]}, {"conversations": TURNS})["messages"]
    assert rows[0][1]["tool_calls"] == call["tool_calls"]
    assert rows[1] == MESSAGES


def test_a_trainers_own_dataset_is_checked_too() -> None:
    with pytest.raises(DatasetError, match="row 1, is in ShareGPT's format"):
        check_dataset(Dataset.from_list([{"conversations": TURNS}]))
    with pytest.raises(DatasetError, match="row 2, has no message"):
        check_dataset(Dataset.from_list([{"messages": MESSAGES}, {"messages": []}]))
    assert check_dataset(Dataset.from_list([{"messages": MESSAGES}])).examples == 1


def test_a_row_that_the_template_refuses_is_named() -> None:
    alternate = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    fine = [USER, ANSWER]
    dataset = Dataset.from_list([{"messages": fine}, {"messages": [USER, *fine]}])
    with pytest.raises(DatasetError, match="the eval dataset, row 2: .*roles must alternate"):
        refuse_rows(tiny_tokenizer(alternate), {"train": None, "eval": dataset})
    refuse_rows(tiny_tokenizer(alternate), {"train": dataset.select([0]), "eval": None})


@pytest.mark.parametrize(
    "options", [{"path": 3}, {"path": ""}, {"too_long": "crop"}, {"too_long": True}, {"split": None}, {"text_field": 1}]
)
def test_options_of_another_type(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        read_dataset(DataOptions(**{"path": "x.jsonl", **options}))
