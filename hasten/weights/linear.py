"""The storage formats of a Linear's weight. bitsandbytes is imported only once one of its layers is at hand."""

from typing import Literal

import torch
from torch import nn

Storage = Literal["dense", "nf4", "fp4", "int8"]


def storage_of(linear: nn.Module) -> Storage:
    """The format of `linear.weight`. Raises TypeError for a module without a weight of a known format."""
    weight = getattr(linear, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return linear.weight.quant_state.quant_type if getattr(weight, "quant_state", None) is not None else "nf4"
    if kind == "Int8Params":
        return "int8"
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return "dense"
    raise TypeError(f"{type(linear).__name__} holds no weight that hasten can read (found {kind})")


def dequantize(linear: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight as a (out, in) matrix of `dtype` (None: dense keeps its own; NF4 and int8 give the compute dtype).

    A dense weight of the right dtype is returned itself, not copied. Source of the formats: Dettmers et al. 2023
    (arXiv:2305.14314) for NF4, 2022 (arXiv:2208.07339) for LLM.int8.
    """
    storage = storage_of(linear)
    weight: torch.Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    if storage == "dense":
        dense = weight.detach() if not weight.requires_grad else weight
        return dense if dtype is None else dense.to(dtype)
    if storage == "int8":
        import bitsandbytes.functional as bnb

        scale = getattr(weight, "SCB", None)
        scale = scale if scale is not None else linear.state.SCB  # pyright: ignore[reportAttributeAccessIssue]
        data = weight.data if weight.data.dtype == torch.int8 else linear.state.CB  # pyright: ignore[reportAttributeAccessIssue]
        dense = bnb.int8_vectorwise_dequant(data, scale)
        return dense.to(dtype if dtype is not None else torch.float16)
    import bitsandbytes.functional as bnb

    dense = bnb.dequantize_4bit(weight.data, weight.quant_state)  # pyright: ignore[reportAttributeAccessIssue]
    return dense if dtype is None else dense.to(dtype)
