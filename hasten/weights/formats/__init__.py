"""Storage formats of a Linear's weight, and the registry. Code that depends on the format looks it up here."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from hasten.weights.formats.base import LoadPlan, QuantizedTensor, WeightFormat
from hasten.weights.formats.dense import Dense
from hasten.weights.formats.int8 import INT8
from hasten.weights.formats.nf4 import FP4, NF4
from hasten.weights.formats.registry import Registry

FORMATS = Registry(NF4(), FP4(), INT8(), Dense())
"""`Dense` is last: it matches any floating-point weight."""


def registered(*added: WeightFormat) -> AbstractContextManager[None]:
    """Makes formats of your own known inside a `with` block, in all threads, before hasten's own.

    A model in such a format must be loaded, run and exported inside the block. Raises ValueError where a name, load
    argument, choice or save method is taken.
    """
    return FORMATS.registered(*added)


def find_format(linear: nn.Module) -> WeightFormat | None:
    """Returns the format in which this module (without PEFT's wrapper) stores its weight; None where hasten knows
    none."""
    for one in FORMATS.formats:
        if one.matches(linear):
            return one
    return None


def format_of(linear: nn.Module) -> WeightFormat:
    """Returns the result of `find_format`. Raises TypeError for a module without a weight of a known format."""
    found = find_format(linear)
    if found is None:
        kind = type(getattr(linear, "weight", None)).__name__
        raise TypeError(f"{type(linear).__name__} has no weight that hasten can read (found {kind})")
    return found


def is_quantized(linear: nn.Module) -> bool:
    """Returns whether this module is a Linear whose format does not keep a dense checkpoint's values. Raises as
    `format_of`."""
    return isinstance(linear, nn.Linear) and not format_of(linear).exact


def named(name: str) -> WeightFormat:
    """Returns the format of a name. Raises KeyError."""
    return {one.name: one for one in FORMATS}[name]


def dense() -> WeightFormat:
    """Returns the format of weights that are not quantised."""
    return next(one for one in FORMATS if one.exact)


def default() -> WeightFormat:
    """Returns the format to load in where no argument asks for one."""
    return next(one for one in FORMATS if one.by_default)


def by_choice(choice: str | None) -> WeightFormat:
    """Returns the format of a value of `--load`, or of `estimate(quantization=)` (None = dense). Raises KeyError."""
    return dense() if choice is None else {one.choice: one for one in FORMATS if one.choice}[choice]


def choices() -> list[str]:
    """Returns the values of `--load`."""
    return [one.choice for one in FORMATS if one.choice is not None]


def by_load_argument(argument: str) -> WeightFormat:
    """Returns the format that an argument of `from_pretrained` asks for. Raises KeyError."""
    return {one.load_argument: one for one in FORMATS if one.load_argument}[argument]


def load_arguments(quantized: bool = False) -> dict[str, str]:
    """Returns {argument of `from_pretrained`: name of the format that it asks for}; quantized: without exact
    formats."""
    return {one.load_argument: one.name for one in FORMATS if one.load_argument and not (quantized and one.exact)}


def stored_format(record: Mapping[str, Any]) -> WeightFormat | None:
    """Returns the format of a checkpoint with this `quantization_config`; None where hasten knows none."""
    return next((one for one in FORMATS if record and one.stored_in(record)), None)


def smallest_loadable() -> WeightFormat:
    """Returns the format with the fewest bits among those that an argument of `from_pretrained` asks for."""
    return min((one for one in FORMATS if one.load_argument is not None), key=lambda one: one.bits)


def save_methods() -> list[str]:
    """Returns the values of `save_method` that write a quantised checkpoint."""
    return [one.save_method for one in FORMATS if one.save_method is not None]


def packages() -> list[str]:
    """Returns the optional packages that the formats need."""
    return sorted({one.package for one in FORMATS if one.package is not None})


__all__ = [
    "FORMATS",
    "LoadPlan",
    "QuantizedTensor",
    "WeightFormat",
    "by_choice",
    "by_load_argument",
    "choices",
    "default",
    "dense",
    "find_format",
    "format_of",
    "is_quantized",
    "load_arguments",
    "named",
    "packages",
    "registered",
    "save_methods",
    "smallest_loadable",
    "stored_format",
]
