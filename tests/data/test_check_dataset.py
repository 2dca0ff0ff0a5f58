"""What `check_dataset` counts and refuses before step one, with and without the trainer that tokenises."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hasten.data import IGNORE_INDEX, DatasetCounts, check_dataset, drop_long
from hasten.data.labels import label_mask
from hasten.errors import DatasetError
from hasten.patching import apply
from hasten.testing import tiny_model, tiny_tokenizer


def patched_tiny() -> Any:
    model = tiny_model("llama", num_hidden_layers=1)
    apply(model)
    return model


def sft(data: Any, folder: Path, **settings: Any) -> SFTTrainer:
    """TRL's trainer, ready to train."""
    config = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **settings)
    return SFTTrainer(model=patched_tiny(), args=config, train_dataset=data, processing_class=tiny_tokenizer())


def test_truncated_and_masked_examples_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = Dataset.from_list(
        [
            {"input_ids": list(range(10)), "labels": [-100] * 4 + list(range(4, 10))},
            {"input_ids": list(range(10)), "labels": [-100] * 8 + [8, 9]},
            {"input_ids": list(range(5)), "labels": [0, -100, -100, -100, -100]},
            {"input_ids": list(range(3)), "labels": [0, 1, 2]},
        ]
    )
    with caplog.at_level(logging.WARNING, "hasten.data.check"):
        counts = check_dataset(data, max_length=8)
    assert (counts.examples, counts.truncated, counts.lost, counts.masked) == (4, 2, 4, 2)
    assert (counts.tokens, counts.labels) == (8 + 8 + 5 + 3, 4 + 0 + 0 + 2)
    assert "2 examples truncated (4 tokens lost), 2 examples without a label" in caplog.text
    caplog.clear()
    whole = check_dataset(data.select([0, 3]))
    assert (whole.truncated, whole.masked, whole.labels) == (0, 0, 8) and not caplog.text


def test_nothing_to_learn_raises_before_step_one(tmp_path: Path) -> None:
    masked = {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}
    late = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}
    with pytest.raises(DatasetError, match="train dataset is empty"):
        check_dataset(Dataset.from_list([]))
    with pytest.raises(DatasetError, match="eval dataset is None"):
        check_dataset(None, name="eval")
    with pytest.raises(DatasetError, match="all 3 examples are masked"):
        check_dataset(Dataset.from_list([masked] * 3))
    with pytest.raises(DatasetError, match="after truncation to max_length=3"):
        check_dataset(Dataset.from_list([late] * 3), max_length=3)
    with pytest.raises(DatasetError, match="masked"):
        check_dataset(Dataset.from_list([{"input_ids": [5, 6], "completion_mask": [1, 0]}]))
    assert check_dataset(Dataset.from_list([late] * 3)).labels == 3

    prompts = Dataset.from_list([{"prompt": "a" * 30, "completion": "b"}] * 4)
    trainer = sft(prompts, tmp_path, max_length=20)
    with pytest.raises(DatasetError, match="all 4 examples are masked.*prompt or assistant mask"):
        check_dataset(prompts, trainer)


def test_examples_that_the_trainer_tokenises_are_counted_before_truncation(tmp_path: Path) -> None:
    data = Dataset.from_list([{"prompt": "a" * n, "completion": "b" * 5} for n in (3, 20, 40)])
    assert check_dataset(data).examples == 3 and check_dataset(data).truncated is None
    trainer = sft(data, tmp_path, max_length=24)
    counts = check_dataset(data, trainer)
    # BOS, prompt, completion, EOS: 10, 27 and 47 tokens
    assert (counts.examples, counts.truncated, counts.lost, counts.masked) == (3, 2, 3 + 23, 1)
    assert counts.labels == 6 + 3
    assert counts.labels == sum(label != -100 for example in trainer.train_dataset for label in example["labels"])
    assert trainer.args.max_length == 24 and len(trainer.train_dataset) == 2
    assert check_dataset(trainer.train_dataset, trainer).truncated == 0
    split = sft(data, tmp_path, max_length=24, packing=True, packing_strategy="bfd_split")
    assert check_dataset(data, split).truncated == 0
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    plain = Trainer(model=patched_tiny(), args=arguments, train_dataset=split.train_dataset)
    with pytest.raises(DatasetError, match="does not tokenise"):
        check_dataset(data, plain)


def test_streams_are_checked_for_a_first_example() -> None:
    full = IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    empty = IterableDataset.from_generator(lambda: iter([]))
    assert check_dataset(full).examples is None
    with pytest.raises(DatasetError, match="empty"):
        check_dataset(empty)


def test_labels_come_before_masks_and_masks_are_joined() -> None:
    ids = [5, 6, 7]
    assert label_mask({"input_ids": ids}) == [True] * 3
    assert label_mask({"input_ids": ids, "labels": [IGNORE_INDEX, 6, 0], "completion_mask": [1, 1, 1]}) == [
        False,
        True,
        True,
    ]
    assert label_mask({"input_ids": ids, "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}) == [
        False,
        True,
        False,
    ]


def test_long_examples_are_dropped_by_their_tokens(tmp_path: Path) -> None:
    data = Dataset.from_list([{"prompt": "a" * n, "completion": "b" * 5} for n in (3, 20, 40)])
    trainer = sft(data, tmp_path, max_length=27)
    drop_long(trainer, data, 27)
    assert [len(example["input_ids"]) for example in trainer.train_dataset] == [10, 27]
    with pytest.raises(DatasetError, match="all 3 examples of the train dataset are longer than max_seq_length=9"):
        drop_long(trainer, data, 9)


def test_counts_say_what_was_not_counted() -> None:
    assert str(DatasetCounts(None)) == "a stream of examples, not counted"
    assert str(DatasetCounts(3)) == "3 examples, not counted"
