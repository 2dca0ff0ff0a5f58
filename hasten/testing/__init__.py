"""Tools to test models and families with: amplified tiny models, an accuracy rule, and `check_family`."""

from hasten.testing.tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer

__all__ = ["save_tiny", "tiny_config", "tiny_model", "tiny_tokenizer"]
