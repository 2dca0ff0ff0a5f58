"""Checks activation checkpointing (`use_gradient_checkpointing`) and its `memory_budget`."""

from hasten.options.fields import AdapterFields, LoadFields
from hasten.suggest import did_you_mean
from hasten.units import parse_bytes

PLANNED = ("unsloth", "auto")
"""Modes in which the memory policy chooses for each layer what to recompute and what to offload."""
CHECKPOINTING = (False, True, "offload", *PLANNED)


def check(options: LoadFields | AdapterFields) -> list[str]:
    """Checks that the mode is known, that the budget can be parsed, and that the mode uses a budget."""
    mode = options.use_gradient_checkpointing
    if not isinstance(mode, bool | str) or mode not in CHECKPOINTING:
        known = "False, True, 'offload', 'unsloth', 'auto'"
        return [f"use_gradient_checkpointing={mode!r}: must be one of {known}{did_you_mean(mode, CHECKPOINTING)}"]
    if options.memory_budget is None:
        return []
    try:
        parse_bytes(options.memory_budget)
    except ValueError as error:
        return [f"memory_budget: {error}"]
    if mode not in PLANNED:
        return [
            f"memory_budget is used by use_gradient_checkpointing='auto', and {mode!r} was asked for; drop one of them"
        ]
    return []
