"""bitsandbytes' 4-bit formats: NF4 (Dettmers et al. 2023, arXiv:2305.14314) and FP4, with doubly quantised scales.

bitsandbytes is imported only when one of its layers is read or created.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.ops.lora import Weight
from hasten.ops.matvec import Part
from hasten.ops.nf4 import NF4Weight, dequantize_nf4, matvecs_nf4
from hasten.weights.formats.base import (
    LoadPlan,
    Matrix,
    QuantizedTensor,
    WeightFormat,
    chunks,
    kept_dense_by_default,
    tensor_bytes,
)
from hasten.weights.formats.codes import codes_agree
from hasten.weights.formats.pickles import reduce_params4bit
from hasten.weights.own_forward import runs_forward_of

BLOCK = 64
"""Weights that share one scale, bitsandbytes' default."""
SCALE_BLOCK = 256
"""Scales that share one fp32 scale of scales."""
BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * SCALE_BLOCK)
"""Per weight: four bits, an 8-bit scale per block, an fp32 scale of scales per 256 blocks."""
WIDTHS = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Bytes of the dtypes in which bitsandbytes may store the codes (quant_storage)."""


@dataclass(frozen=True)
class PackedWeight(Weight):
    """An NF4 weight, dequantised at each call."""

    weight: NF4Weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.packed.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_nf4(self.weight, dtype)

    def write(self, out: torch.Tensor) -> None:
        dequantize_nf4(self.weight, out.dtype, out)

    @classmethod
    def matvecs(
        cls,
        parts: Sequence[Part[Any]],
        x_E: torch.Tensor,
        xa_SR: torch.Tensor | None = None,
        residual_O: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        packed = [replace(part, weight=part.weight.weight) for part in parts]
        return matvecs_nf4(packed, x_E, xa_SR, residual_O, activation)


class _FourBit(WeightFormat):
    """The common base of NF4 and FP4, which differ only in the code book; `name` selects it."""

    stored_argument: ClassVar[str | None] = "load_in_4bit"
    bits: ClassVar[int] = 4
    package: ClassVar[str | None] = "bitsandbytes"
    extra: ClassVar[str | None] = "train"
    reduce = staticmethod(reduce_params4bit)

    def matches(self, linear: nn.Module) -> bool:
        weight: Any = linear._parameters.get("weight")
        if type(weight).__name__ != "Params4bit":
            return False
        state = getattr(weight, "quant_state", None)
        return (weight if state is None else state).quant_type == self.name

    def dequantize(self, linear: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the values that the layer computes with: rounded to its compute dtype first, then cast."""
        import bitsandbytes.functional as bnb

        dense = bnb.dequantize_4bit(*_plain_state(linear))
        return dense if dtype is None else dense.to(dtype)

    def holds(self, linear: Any, dense: torch.Tensor) -> bool:
        """Compares the codes."""
        import bitsandbytes.functional as bnb

        mine, state = _plain_state(linear)
        if tuple(state.shape) != tuple(dense.shape):
            return False
        theirs, _ = bnb.quantize_4bit(
            dense.to(mine.device, state.dtype).contiguous(),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            quant_storage=mine.dtype,
        )
        return codes_agree(mine.view(torch.uint8), theirs.view(torch.uint8))

    def stored_bytes(self, linear: Any) -> int:
        state = getattr(linear.weight, "quant_state", None)
        if state is None:
            return tensor_bytes(linear.weight)
        return tensor_bytes(linear.weight, state.absmax, *([state.state2.absmax] if state.nested else []))

    def bytes_for(self, rows: int, columns: int, itemsize: int) -> int:
        return round(rows * columns * BYTES)

    def after_load(self, linear: Any) -> None:
        """Keeps bitsandbytes from changing the layout in which the codes were read.

        On CPUs with AVX512-BF16 its first forward in evaluation mode repacks them and rounds their scales to bf16: one
        `generate` would change the weights that are trained on and merged, and inputs off a multiple of 64 fail.
        """
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False

    def stored_in(self, record: Mapping[str, Any]) -> bool:
        four_bit = record.get("quant_method") == "bitsandbytes" and not record.get("load_in_8bit")
        return four_bit and record.get("bnb_4bit_quant_type", "nf4") == self.name

    def kept_dense_in(self, record: Mapping[str, Any]) -> list[str]:
        return list(record.get("llm_int8_skip_modules") or ())

    def fits(self, shape: tuple[int, ...], dtype: str, numbers: int, suffixes: Collection[str]) -> bool:
        """Expects two codes per byte."""
        state = any(suffix.startswith(".quant_state.") for suffix in suffixes)
        return state and torch.Size(shape).numel() * WIDTHS.get(dtype, 0) == (numbers + 1) // 2

    def problems_on_load(self, empty: nn.Module, on_cpu: bool, kept_dense: Sequence[str]) -> list[str]:
        wrong = [name for name in _misread_on_cpu(empty) if name not in kept_dense] if on_cpu else []
        if not wrong:
            return []
        return [
            f"the checkpoint is stored as {self.name}, and bitsandbytes misreads {len(wrong)} of its layers on a CPU (the "
            f"inputs of {wrong[0]} are not a multiple of {BLOCK}); load it on a GPU, or pass the dense original"
        ]

    def fill(self, linear: Any, matrix: Matrix) -> None:
        """Blocks are quantised independently, so the codes are exactly bitsandbytes' own for the whole matrix. The
        number of input channels must be a multiple of `BLOCK`."""
        import bitsandbytes as bnb
        from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

        count, width = matrix.get_shape()
        codes = torch.empty(count * width // 2, 1, dtype=torch.uint8)
        scales = torch.empty(count * width // BLOCK)
        state: Any = None
        for start, dense in chunks(matrix):
            packed, state = quantize_4bit(dense, blocksize=BLOCK, quant_type=self.name, compress_statistics=False)
            codes[start * width // 2 :][: packed.shape[0]] = packed
            scales[start * width // BLOCK :][: state.absmax.shape[0]] = state.absmax
        offset = scales.mean()
        scales, outer = quantize_blockwise(scales - offset, blocksize=SCALE_BLOCK)
        whole = QuantState(
            absmax=scales,
            shape=torch.Size((count, width)),
            code=state.code,
            blocksize=BLOCK,
            quant_type=self.name,
            dtype=state.dtype,
            offset=offset,
            state2=outer,
        )
        linear.weight = bnb.nn.Params4bit.from_prequantized(
            codes, whole.as_dict(packed=True), device="cpu", module=linear
        )

    def convert(self, linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        dtype, bias = linear.weight.dtype, linear.bias is not None
        made: Any = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias, dtype, True, self.name, device="meta"
        )
        make: Any = bnb.nn.Params4bit
        packed = make(linear.weight.data.clone(), requires_grad=False, quant_type=self.name, compress_statistics=True)
        made.weight = packed.to(linear.weight.device)  # bitsandbytes quantises on moving
        made.bias = linear.bias
        return made

    def mark(self, model: Any) -> None:
        model.is_loaded_in_4bit = True

    def quantize(self, dense: torch.Tensor) -> QuantizedTensor:
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(dense.contiguous(), compress_statistics=True, quant_type=self.name)
        scales = {f".{part}": value for part, value in state.as_dict(packed=True).items()}
        return QuantizedTensor({"": codes, **scales}, bnb.dequantize_4bit(codes, state))

    def export_config(self, dtype: torch.dtype, kept_dense: Sequence[str]) -> dict[str, Any]:
        return _settings(self.name, dtype, list(kept_dense)).to_dict()


class NF4(_FourBit):
    name = "nf4"
    load_argument = "load_in_4bit"
    by_default = True
    choice = "4bit"
    save_method = "merged_4bit"

    def weight(self, linear: Any) -> Weight | str:
        weight = linear.weight
        state = weight.quant_state
        if state is None:
            return f"stored as {type(linear).__name__}, not quantised yet"
        if getattr(state, "packing_format_for_cpu", False):
            return "4-bit, but not NF4 in the plain layout"
        if not runs_forward_of(type(linear), ("bitsandbytes",)):
            return f"forward of {type(linear).__name__}"
        packed, shape = weight.data.view(torch.uint8), (int(state.shape[0]), int(state.shape[1]))
        if not state.nested:
            return PackedWeight(NF4Weight(packed, state.code, shape, state.absmax, block=state.blocksize))
        outer = state.state2
        return PackedWeight(
            NF4Weight(
                packed,
                state.code,
                shape,
                state.absmax,
                outer.code,
                outer.absmax,
                state.offset,
                state.blocksize,
                outer.blocksize,
            )
        )

    def plan_load(self, empty: nn.Module, dtype: torch.dtype, on_cpu: bool) -> LoadPlan:
        """Plans NF4, but leaves layers dense that bitsandbytes misreads on a CPU."""
        dense = _misread_on_cpu(empty) if on_cpu else []
        notes = ["quantisation: NF4 with double quantisation"]
        if dense:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in dense}))
            notes.append(
                f"quantisation: {len(dense)} layers stay dense ({kinds}): their inputs are not a multiple of {BLOCK}, "
                "which bitsandbytes misreads on a CPU"
            )
        kept = [*kept_dense_by_default(empty), *dense] if dense else None
        return LoadPlan(_settings(self.name, dtype, kept), kept or (), tuple(notes))


class FP4(_FourBit):
    """Only read from checkpoints that are stored in it; no argument of hasten selects it."""

    name = "fp4"
    fused = False

    def weight(self, linear: Any) -> Weight | str:
        return "4-bit, but not NF4 in the plain layout"


def _settings(kind: str, dtype: torch.dtype, kept_dense: list[str] | None) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept_dense,
    )


def _misread_on_cpu(empty: nn.Module) -> list[str]:
    """Returns the linears whose input channels are not a whole number of blocks.

    bitsandbytes' CPU code starts each output channel at a new scale, though blocks continue across them (seen in 0.50:
    relative error 0.28 instead of 0.09, and a RuntimeError in the first forward in eval mode).
    """
    kept = kept_dense_by_default(empty)
    return [
        name
        for name, module in empty.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % BLOCK and name not in kept
    ]


def _plain_state(linear: Any) -> tuple[torch.Tensor, Any]:
    """Returns (packed codes, quant state) in the plain layout; those of the layer are not changed.

    On a CPU with AVX512-BF16 the first forward in eval mode repacks a layer's codes for its kernel and rounds the block
    scales to bf16; a copy of the codes is put back in order here.
    """
    codes, state = linear.weight.data, linear.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    plain = copy.copy(state)
    plain.original_nested = False  # the scales are no longer nested; quantising them again would only lose digits
    plain.absmax = state.absmax.T.reshape(-1).float().contiguous()
    codes, plain = _convert_weight_packed_for_cpu_inverse(codes, plain)
    return codes, plain
