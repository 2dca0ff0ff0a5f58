"""Generation around transformers' own `generate`: length check, padding of either side, evaluation mode inside."""

from hasten.inference.generate import generate
from hasten.inference.modes import for_inference

__all__ = ["for_inference", "generate"]
