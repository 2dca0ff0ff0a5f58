"""Reads datasets, counts what a trainer will truncate and mask, and drops examples that are too long."""

from hasten.data.chat import to_messages
from hasten.data.check import DatasetCounts, check_dataset
from hasten.data.labels import IGNORE_INDEX
from hasten.data.lengths import drop_long
from hasten.data.read import read_dataset
from hasten.data.template_rows import refuse_rows
from hasten.data.tokens import tokenized

__all__ = [
    "IGNORE_INDEX",
    "DatasetCounts",
    "check_dataset",
    "drop_long",
    "read_dataset",
    "refuse_rows",
    "to_messages",
    "tokenized",
]
