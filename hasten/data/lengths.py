"""Drops examples that are longer than the model's `max_seq_length`."""

from typing import TYPE_CHECKING, Any

from hasten.data.tokens import tokenized
from hasten.errors import DatasetError

if TYPE_CHECKING:
    from datasets import Dataset


def drop_long(trainer: Any, dataset: "Dataset", limit: int, name: str = "train") -> None:
    """Replaces the trainer's training data by the examples of `dataset` that have at most `limit` tokens.

    trainer: TRL's SFTTrainer, whose data still has all examples, truncated. Raises DatasetError where no example is
    left.
    """
    short = tokenized(dataset, trainer, name).filter(lambda example: len(example["input_ids"]) <= limit)
    if not len(short):
        raise DatasetError(
            f"all {len(dataset)} examples of the {name} dataset are longer than max_seq_length={limit}, and too_long is "
            "'drop'; raise model.max_seq_length, or use too_long: truncate"
        )
    trainer.train_dataset = trainer._prepare_dataset(
        short, trainer.processing_class, trainer.args, trainer.args.packing, None, name
    )
