"""Generates: engines, the stock one around transformers' `generate`, and evaluation mode."""

from hasten.inference.engine import engine_of
from hasten.inference.generate import generate
from hasten.inference.modes import for_inference

__all__ = ["engine_of", "for_inference", "generate"]
