"""The arguments of the public calls as frozen dataclasses, and the checks that list every problem of a call at once.

`fields` declares the arguments. Each feature has one file with its rules and a `check(options) -> list[str]`; `load` and
`adapter` list the checks, so a new feature is a new file and one entry in `LOAD_CHECKS` or `ADAPTER_CHECKS`. What needs the
checkpoint's config is checked by `hasten.loading` and raised in the same error.
"""

from hasten.options.adapter import AdapterOptions
from hasten.options.arguments import HUB_ARGUMENTS, MODEL_ARGUMENTS, unknown_extra
from hasten.options.call import none_if_left_out
from hasten.options.checkpointing import CHECKPOINTING, PLANNED
from hasten.options.data import DataOptions, SaveOptions
from hasten.options.device import PLACEMENTS
from hasten.options.engine import EngineOptions
from hasten.options.fields import ALL_LINEAR
from hasten.options.load import LoadOptions, bad_values

__all__ = [
    "ALL_LINEAR",
    "CHECKPOINTING",
    "HUB_ARGUMENTS",
    "MODEL_ARGUMENTS",
    "PLACEMENTS",
    "PLANNED",
    "AdapterOptions",
    "DataOptions",
    "EngineOptions",
    "LoadOptions",
    "SaveOptions",
    "bad_values",
    "none_if_left_out",
    "unknown_extra",
]
