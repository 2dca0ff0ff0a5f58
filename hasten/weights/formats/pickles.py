"""The parts of bitsandbytes' weights for pickle (see `weights.pickling`). Unpickling registers them again, since that
process may pickle the weights too."""

import copyreg
from typing import Any


def reduce_params4bit(weight: Any) -> tuple[Any, ...]:
    """Returns what `__reduce_ex__` of a Params4bit should return; its state holds the codes and the scales."""
    return _params4bit, (type(weight),), weight.__getstate__()


def reduce_int8_params(weight: Any) -> tuple[Any, ...]:
    """Returns what `__reduce_ex__` of an Int8Params should return: the arguments of its constructor."""
    parts = (weight.data, weight.requires_grad, weight.has_fp16_weights, weight.CB, weight.SCB)
    return _int8_params, (type(weight), *parts)


def _params4bit(kind: Any) -> Any:
    copyreg.pickle(kind, reduce_params4bit)
    return kind.__new__(kind)


def _int8_params(kind: Any, *parts: Any) -> Any:
    copyreg.pickle(kind, reduce_int8_params)
    return kind(*parts)
