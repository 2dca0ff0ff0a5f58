"""Checks the dtype that a model computes in (`dtype`)."""

from collections.abc import Mapping
from typing import Any

import torch

from hasten.options.fields import LoadFields
from hasten.options.values import Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(value: Any) -> str | None:
    """Validates `dtype`."""
    return None if value is None or value in DTYPES else f"must be None, {', '.join(map(str, DTYPES))}"


RULES: Mapping[str, Rule] = {"dtype": compute_dtype}


def check(options: LoadFields) -> list[str]:
    """Refuses 16 bits together with float32."""
    if options.load_in_16bit and options.dtype == torch.float32:
        return ["load_in_16bit and dtype=torch.float32 contradict each other; drop one of them"]
    return []
