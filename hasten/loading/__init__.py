"""From a name to a stock transformers model with its weights and a tokenizer; what cannot be is refused before that."""

from hasten.loading.load import Loaded, load
from hasten.loading.resolve import Source

__all__ = ["Loaded", "Source", "load"]
