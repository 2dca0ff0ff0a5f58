"""LLM.int8 of bitsandbytes (Dettmers et al. 2022, arXiv:2208.07339): int8 codes, one fp32 scale per output channel."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hasten.ops.lora import Weight
from hasten.weights.formats.base import LoadPlan, Matrix, WeightFormat, chunks, tensor_bytes
from hasten.weights.formats.codes import codes_agree
from hasten.weights.formats.pickles import reduce_int8_params

SCALE_BYTES = 4


class INT8(WeightFormat):
    name = "int8"
    load_argument = "load_in_8bit"
    choice = "8bit"
    bits = 8
    fused = False
    package = "bitsandbytes"
    extra = "train"
    reduce = staticmethod(reduce_int8_params)

    def matches(self, linear: nn.Module) -> bool:
        return type(linear._parameters.get("weight")).__name__ == "Int8Params"

    def weight(self, linear: Any) -> Weight | str:
        return f"stored as {type(linear).__name__}"

    def dequantize(self, linear: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Dequantises; dtype None = fp16, in which the layer computes."""
        import bitsandbytes.functional as bnb

        return bnb.int8_vectorwise_dequant(*_codes_and_scale(linear)).to(torch.float16 if dtype is None else dtype)

    def holds(self, linear: Any, dense: torch.Tensor) -> bool:
        """Compares the codes."""
        import bitsandbytes.functional as bnb

        mine, _ = _codes_and_scale(linear)
        if tuple(dense.shape) != tuple(mine.shape):
            return False
        return codes_agree(mine, bnb.int8_vectorwise_quant(dense.to(mine.device, torch.float16))[0])

    def stored_bytes(self, linear: Any) -> int:
        return tensor_bytes(*_codes_and_scale(linear))

    def bytes_for(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns + SCALE_BYTES * rows

    def stored_in(self, record: Mapping[str, Any]) -> bool:
        return record.get("quant_method") == "bitsandbytes" and bool(record.get("load_in_8bit"))

    def kept_dense_in(self, record: Mapping[str, Any]) -> list[str]:
        return list(record.get("llm_int8_skip_modules") or ())

    def plan_load(self, empty: nn.Module, dtype: torch.dtype, on_cpu: bool) -> LoadPlan:
        from transformers import BitsAndBytesConfig

        return LoadPlan(BitsAndBytesConfig(load_in_8bit=True), notes=("quantisation: LLM.int8",))

    def fill(self, linear: Any, matrix: Matrix) -> None:
        """Quantises some output channels at a time. They are independent, so the codes are exactly bitsandbytes'
        own."""
        import bitsandbytes as bnb
        from bitsandbytes.functional import int8_vectorwise_quant

        codes = torch.empty(tuple(matrix.get_shape()), dtype=torch.int8)
        scales = torch.empty(codes.shape[0])
        for start, dense in chunks(matrix):
            part, scale, _ = int8_vectorwise_quant(dense.to(torch.float16))
            codes[start : start + part.shape[0]] = part
            scales[start : start + part.shape[0]] = scale
        make: Any = bnb.nn.Int8Params
        kept = linear.weight.has_fp16_weights
        linear.weight = make(codes, requires_grad=False, has_fp16_weights=kept, CB=codes, SCB=scales)

    def convert(self, linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        bias = linear.bias is not None
        made: Any = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias, has_fp16_weights=False, device="meta"
        )
        make: Any = bnb.nn.Int8Params
        packed = make(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        made.weight = packed.to(linear.weight.device)  # bitsandbytes quantises on moving
        made.bias = linear.bias
        return made

    def mark(self, model: Any) -> None:
        model.is_loaded_in_8bit = True


def _codes_and_scale(linear: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (codes (out, in) int8, scale (out,) fp32). bitsandbytes moves both to `linear.state` on the first
    forward."""
    weight = linear.weight
    scale = getattr(weight, "SCB", None)
    scale = scale if scale is not None else linear.state.SCB
    codes = weight.data if weight.data.dtype == torch.int8 else linear.state.CB
    return codes, scale
