"""A format that only the tests know: int8 codes with one fp32 scale per tensor. Everything it needs is in this file."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hasten.ops.lora import Weight
from hasten.weights.formats import QuantizedTensor, WeightFormat
from hasten.weights.formats.base import SKIPPED, Matrix, chunks, tensor_bytes

CALLS: Counter[str] = Counter()


class ToyLinear(nn.Linear):
    """Stores `weight` (out, in) int8 and `weight_scale` () fp32 as buffers."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, like: nn.Linear, device: str) -> None:
        super().__init__(
            like.in_features, like.out_features, like.bias is not None, device=device, dtype=like.weight.dtype
        )
        del self.weight
        shape = (self.out_features, self.in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty((), device=device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, dense_of(self, input.dtype), self.bias)


def dense_of(linear: ToyLinear, dtype: torch.dtype) -> torch.Tensor:
    return (linear.weight * linear.weight_scale).to(dtype)


class ToyWeight(Weight):
    overrides_matmul = True

    def __init__(self, linear: ToyLinear) -> None:
        self.linear = linear

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dense_of(self.linear, dtype)

    def matmul(
        self, x_NE: torch.Tensor, add_to: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        CALLS["matmul"] += 1
        return super().matmul(x_NE, add_to, out)

    def matmul_t(
        self, dy_NO: torch.Tensor, add_to: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        CALLS["matmul_t"] += 1
        return super().matmul_t(dy_NO, add_to, out)


class Toy(WeightFormat):
    name = "toy"
    load_argument = "load_in_toy"
    choice = "toy"
    save_method = "merged_toy"
    bits = 8

    def matches(self, linear: nn.Module) -> bool:
        return type(linear) is ToyLinear

    def weight(self, linear: Any) -> Weight | str:
        return ToyWeight(linear)

    def dequantize(self, linear: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return dense_of(linear, dtype or torch.float32)

    def holds(self, linear: Any, dense: torch.Tensor) -> bool:
        return torch.equal(self.quantize(dense).tensors[""], linear.weight)

    def stored_bytes(self, linear: Any) -> int:
        return tensor_bytes(linear.weight, linear.weight_scale)

    def bytes_for(self, rows: int, columns: int, itemsize: int) -> int:
        return rows * columns + 4

    def stored_in(self, record: Mapping[str, Any]) -> bool:
        return record.get("quant_method") == self.name

    def reads_stored(self) -> bool:
        return True

    def empty(self, linear: nn.Linear) -> nn.Module:
        return ToyLinear(linear, "meta")

    def fill(self, linear: Any, matrix: Matrix) -> None:
        scale = torch.stack([part.abs().max() for _, part in chunks(matrix)]).max().float() / 127
        codes = torch.empty(tuple(matrix.get_shape()), dtype=torch.int8)
        for start, part in chunks(matrix):
            codes[start : start + part.shape[0]] = (part.float() / scale).round()
        linear.weight, linear.weight_scale = codes, scale

    def quantize(self, dense: torch.Tensor) -> QuantizedTensor:
        scale = dense.abs().max().float() / 127
        codes = (dense.float() / scale).round().to(torch.int8)
        return QuantizedTensor({"": codes, "_scale": scale}, (codes * scale).to(dense.dtype))

    def export_config(self, dtype: torch.dtype, kept_dense: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": self.name, SKIPPED: list(kept_dense)}
