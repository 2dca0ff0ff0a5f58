"""Loads a stock transformers model and its tokenizer by name; checks all arguments before it reads a weight."""

from hasten.loading.load import Loaded, load
from hasten.loading.resolve import Source

__all__ = ["Loaded", "Source", "load"]
