"""Provides tools to test models and families: amplified tiny models, relative errors with limits, and
`check_family`."""

from hasten.testing.accuracy import Comparison, relative_error
from hasten.testing.family import check_family
from hasten.testing.tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer

__all__ = ["Comparison", "check_family", "relative_error", "save_tiny", "tiny_config", "tiny_model", "tiny_tokenizer"]
