"""Weight formats: how a Linear can hold its weight. The only place where a format's name is known."""

from hasten.weights.formats.base import LoadPlan, QuantizedTensor, WeightFormat

__all__ = ["LoadPlan", "QuantizedTensor", "WeightFormat"]
