"""The parts of bitsandbytes' weights for pickle (see `weights.pickling`). They name nothing of hasten's: another model of this
process that is pickled afterwards opens without it."""

import copyreg
from typing import Any


def reduce_params4bit(weight: Any) -> tuple[Any, ...]:
    """Returns what `__reduce_ex__` of a Params4bit should return; its state holds the codes and the scales."""
    return copyreg.__newobj__, (type(weight),), weight.__getstate__()  # pyright: ignore[reportAttributeAccessIssue]


def reduce_int8_params(weight: Any) -> tuple[Any, ...]:
    """Returns what `__reduce_ex__` of an Int8Params should return: the arguments of its constructor."""
    parts = (weight.data, weight.requires_grad, weight.has_fp16_weights, weight.CB, weight.SCB)
    return type(weight), parts
