"""Checks where weights are placed (`device_map`)."""

from collections.abc import Mapping
from typing import Any

import torch

from hasten.options.values import Rule
from hasten.suggest import did_you_mean

PLACEMENTS = ("sequential", "auto", "balanced", "balanced_low_0")
"""Strategies that accelerate turns into a device map."""


def placement(device_map: Any) -> str | None:
    """Validates `device_map`: a strategy, a device, or a dict of module name -> device."""
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    known = ("disk",) if isinstance(device_map, Mapping) else PLACEMENTS
    found = [problem for device in devices if device not in known and (problem := _device_problem(device, known))]
    return "; ".join(found) or None


def _device_problem(device: Any, known: tuple[str, ...]) -> str | None:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        return f"{device!r} must be a torch device or one of {', '.join(known)}{did_you_mean(device, known)}"
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        return f"{device!r} does not exist, this machine has {count} CUDA devices; use 'auto'"
    return None


RULES: Mapping[str, Rule] = {"device_map": placement}
