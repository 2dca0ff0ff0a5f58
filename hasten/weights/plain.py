"""Old import paths of two operands."""

from hasten.ops.lora import DenseWeight
from hasten.weights.formats.nf4 import PackedWeight

__all__ = ["DenseWeight", "PackedWeight"]
