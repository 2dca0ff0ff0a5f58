"""The storage formats of a Linear's weight. bitsandbytes is imported only once one of its layers is at hand."""

import copy
from typing import Any, Literal

import torch
from torch import nn

Storage = Literal["dense", "nf4", "fp4", "int8"]

SAME_CODES = 0.999  # share of codes that must agree: another device may round a value between two codes the other way


def storage_of(linear: nn.Module) -> Storage:
    """The format of `linear.weight`. Raises TypeError for a module without a weight of a known format."""
    weight: Any = getattr(linear, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return weight.quant_state.quant_type if getattr(weight, "quant_state", None) is not None else weight.quant_type
    if kind == "Int8Params":
        return "int8"
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return "dense"
    raise TypeError(f"{type(linear).__name__} holds no weight that hasten can read (found {kind})")


def dequantize(linear: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight as a (out, in) matrix of `dtype` (None: dense keeps its own; NF4 and int8 give the compute dtype).

    A dense weight of the right dtype is returned itself, not copied. 4-bit values are those that the layer computes
    with: rounded to its compute dtype first, then cast. Source of the formats: Dettmers et al. 2023
    (arXiv:2305.14314) for NF4, 2022 (arXiv:2208.07339) for LLM.int8.
    """
    storage = storage_of(linear)
    weight: torch.Tensor = linear.weight  # pyright: ignore[reportAssignmentType]
    if storage == "dense":
        dense = weight.detach() if not weight.requires_grad else weight
        return dense if dtype is None else dense.to(dtype)
    import bitsandbytes.functional as bnb

    if storage == "int8":
        codes, scale = _int8_state(linear)
        return bnb.int8_vectorwise_dequant(codes, scale).to(dtype if dtype is not None else torch.float16)
    dense = bnb.dequantize_4bit(*_nf4_state(linear))
    return dense if dtype is None else dense.to(dtype)


def holds(linear: nn.Module, dense: torch.Tensor) -> bool:
    """Whether `linear.weight` is what storing `dense` (out, in) in its format gives: the layer's weight was not changed.

    A dense weight must equal `dense` cast to its dtype, bit for bit; of quantised ones the codes are compared.
    """
    storage = storage_of(linear)
    weight: Any = linear.weight
    if storage == "dense":
        return tuple(weight.shape) == tuple(dense.shape) and torch.equal(dense.to(weight.device, weight.dtype), weight)
    import bitsandbytes.functional as bnb

    if storage == "int8":
        mine, scale = _int8_state(linear)
        dense = dense.to(mine.device, torch.float16)
        theirs = bnb.int8_vectorwise_quant(dense)[0] if tuple(dense.shape) == tuple(mine.shape) else mine[:0]
        return _agree(mine, theirs)
    mine, state = _nf4_state(linear)
    if tuple(state.shape) != tuple(dense.shape):
        return False
    theirs, _ = bnb.quantize_4bit(
        dense.to(mine.device, state.dtype).contiguous(),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        quant_storage=mine.dtype,
    )
    return _agree(mine.view(torch.uint8), theirs.view(torch.uint8))


def _agree(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    if mine.numel() != theirs.numel():
        return False
    return (mine.flatten() == theirs.flatten()).float().mean().item() >= SAME_CODES


def _int8_state(linear: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (out, in) int8, scale (out,) fp32). bitsandbytes moves both to `linear.state` on the first forward."""
    weight = linear.weight
    scale = getattr(weight, "SCB", None)
    scale = scale if scale is not None else linear.state.SCB
    codes = weight.data if weight.data.dtype == torch.int8 else linear.state.CB
    return codes, scale


def _nf4_state(linear: Any) -> tuple[torch.Tensor, Any]:
    """(packed codes, quant state) in the plain layout, the layer's own left as they are.

    On a CPU with AVX512-BF16 the first forward in eval mode repacks a layer's codes for its kernel and rounds the
    block scales to bf16; the codes are put back in order here, in a copy.
    """
    codes, state = linear.weight.data, linear.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    plain = copy.copy(state)
    plain.original_nested = False  # the scales are single by now; quantising them again would only lose digits
    plain.absmax = state.absmax.T.reshape(-1).float().contiguous()
    codes, plain = _convert_weight_packed_for_cpu_inverse(codes, plain)
    return codes, plain
