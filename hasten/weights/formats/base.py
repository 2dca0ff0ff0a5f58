"""`WeightFormat`: one way of storing a Linear's weight. A new format is one file here and one entry in the registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from hasten.ops.lora import Weight

CHUNK = 2**16
"""Number of weights that `WeightFormat.fill` quantises at a time: small enough for the allocator to reuse the same
memory."""
SKIPPED = "modules_to_not_convert"
"""The field of a `quantization_config` that lists modules left dense, where the format has no name of its own for
it."""


class Matrix(Protocol):
    """A stored (out, in) matrix that is read by slices of output channels, as safetensors' `get_slice` returns it."""

    def get_shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorMatrix:
    """A tensor in memory as a `Matrix`."""

    tensor: torch.Tensor

    def get_shape(self) -> Sequence[int]:
        return self.tensor.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index]


@dataclass(frozen=True)
class WidenedMatrix:
    """A `Matrix` whose slices are cast to a dtype that holds both its own values and those of `dtype`, exactly.

    bitsandbytes dequantises to the dtype that it quantised from: a bf16 checkpoint of an fp32 model must be quantised as fp32.
    """

    matrix: Matrix
    dtype: torch.dtype

    def get_shape(self) -> Sequence[int]:
        return self.matrix.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        values = self.matrix[index]
        return values.to(torch.promote_types(values.dtype, self.dtype))


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight as a checkpoint stores it.

    tensors: suffix -> tensor. The tensor's name in the file is the weight's name followed by the suffix ("" = the name
    itself, ".absmax", ...). dense: (out, in), the values that the stored weight stands for.
    """

    tensors: Mapping[str, torch.Tensor]
    dense: torch.Tensor


@dataclass(frozen=True)
class LoadPlan:
    """How a dense checkpoint is quantised while it is read.

    config: the quantization_config for transformers' from_pretrained; None = hasten replaces the Linears itself,
    through `WeightFormat.empty` and `fill`. kept_dense: names of modules that stay dense. notes: lines for the report.
    """

    config: Any = None
    kept_dense: Sequence[str] = ()
    notes: Sequence[str] = ()


class WeightFormat(ABC):
    """A stateless description of one storage format; every method takes the Linear or tensor that it works on.

    A Linear in this format is an nn.Linear (or a subclass) that stores its codes as `weight`, a parameter or a buffer.

    name: in reports and notes. load_argument: the `from_pretrained` argument that selects it, None = none does.
    by_default: used if no argument selects a format. stored_argument: the load argument that may also be given for a
    checkpoint stored in this format (None = load_argument). choice: the spelling in `hasten ... --load` and
    `estimate(quantization=)`, None = not offered. save_method: the spelling in `save_pretrained_merged`, None = cannot
    be written. bits: per weight, without scales. exact: a dense checkpoint's values survive. trainable: the weight
    itself can train. fused: `weight` returns an operand of `ops.lora`; False = the module's own forward always runs.
    package, extra: the package that must be installed, and the extra of hasten that installs it. reduce: weight -> what
    `weight.__reduce_ex__` should return, where the weight is a subclass of nn.Parameter (see `weights.pickling`).
    """

    name: ClassVar[str]
    load_argument: ClassVar[str | None] = None
    by_default: ClassVar[bool] = False
    stored_argument: ClassVar[str | None] = None
    choice: ClassVar[str | None] = None
    save_method: ClassVar[str | None] = None
    bits: ClassVar[int] = 16
    exact: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    fused: ClassVar[bool] = True
    package: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None
    reduce: ClassVar[Callable[[Any], tuple[Any, ...]] | None] = None

    # A loaded Linear

    @abstractmethod
    def matches(self, linear: nn.Module) -> bool:
        """Returns whether this Linear (the base layer, without PEFT's wrapper) stores its weight in this format. Called
        in every forward, so it must be cheap."""

    @abstractmethod
    def weight(self, linear: Any) -> Weight | str:
        """Returns the weight as an operand of `ops.lora`, or the reason why the module's own forward must run."""

    @abstractmethod
    def dequantize(self, linear: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the weight as an (out, in) matrix of `dtype`; None = the layer's compute dtype."""

    @abstractmethod
    def holds(self, linear: Any, dense: torch.Tensor) -> bool:
        """Returns whether quantising `dense` (out, in) gives the stored weight, i.e. the weight did not change since
        loading."""

    @abstractmethod
    def stored_bytes(self, linear: Any) -> int:
        """Returns the bytes of the stored weight and its scales, without the bias."""

    def after_load(self, linear: Any) -> None:
        """Adjusts a Linear once the model is loaded. Called for every Linear in this format."""
        return

    # Sizes before anything is loaded

    @abstractmethod
    def bytes_for(self, rows: int, columns: int, itemsize: int) -> int:
        """Returns the bytes of a (rows, columns) weight once loaded, with its scales. itemsize: bytes of the compute
        dtype."""

    # Loading

    def stored_in(self, record: Mapping[str, Any]) -> bool:
        """Returns whether a checkpoint's `quantization_config` says that its weights are stored in this format."""
        return False

    def reads_stored(self) -> bool:
        """Returns whether hasten reads such a checkpoint itself, by tensor name into `empty` Linears; False =
        transformers does."""
        return False

    def kept_dense_in(self, record: Mapping[str, Any]) -> list[str]:
        """Returns the modules that a checkpoint's `quantization_config` lists as dense."""
        return list(record.get(SKIPPED) or ())

    def fits(self, shape: tuple[int, ...], dtype: str, numbers: int, suffixes: Collection[str]) -> bool:
        """Returns whether a stored tensor can be the codes of a weight of `numbers` values, which have another shape
        than the weight.

        shape, dtype: from the safetensors header ("U8", "BF16", ...). suffixes: the rest of the names of all tensors
        whose name starts with the weight's.
        """
        return False

    def problems_on_load(self, empty: nn.Module, on_cpu: bool, kept_dense: Sequence[str]) -> list[str]:
        """Returns why a checkpoint that is stored in this format cannot run there. empty: the model on the meta
        device."""
        return []

    def plan_load(self, empty: nn.Module, dtype: torch.dtype, on_cpu: bool) -> LoadPlan:
        """Plans how to quantise a dense checkpoint into this format while it is read. empty: the model on the meta
        device."""
        return LoadPlan(kept_dense=kept_dense_by_default(empty), notes=(f"quantisation: {self.name}",))

    def empty(self, linear: nn.Linear) -> nn.Module:
        """Returns a Linear of this format on the meta device, of the shape of `linear`."""
        raise NotImplementedError(f"{self.name} cannot be loaded into: this format has no Linear class of its own")

    def fill(self, linear: Any, matrix: Matrix) -> None:
        """Quantises a stored matrix into an empty Linear of this format on the CPU, some output channels at a time.

        Nothing of `matrix` (out, in) is read before it is indexed; see `chunks`.
        """
        raise NotImplementedError(f"{self.name} is not quantised while a checkpoint is read")

    def convert(self, linear: nn.Linear) -> nn.Module:
        """Returns a Linear of this format with the values of a dense one, on its device. The bias Parameter is
        shared."""
        made: Any = self.empty(linear)
        self.fill(made, TensorMatrix(linear.weight.detach().cpu()))
        made.bias = linear.bias
        return made.to(linear.weight.device)

    def mark(self, model: nn.Module) -> None:
        """Sets the attributes by which PEFT and transformers recognise a model with Linears in this format."""
        return

    # Export

    def quantize(self, dense: torch.Tensor) -> QuantizedTensor:
        """Quantises `dense` (out, in) to the tensors that this format stores in a checkpoint."""
        raise NotImplementedError(f"{self.name} cannot be written")

    def export_config(self, dtype: torch.dtype, kept_dense: Sequence[str]) -> dict[str, Any] | None:
        """Returns the `quantization_config` of a checkpoint with weights in this format, which `stored_in`
        recognises."""
        return None


def chunks(matrix: Matrix) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index of the first output channel, some output channels) of a stored matrix, in its own dtype."""
    count, width = matrix.get_shape()
    step = max(1, CHUNK // width)
    for start in range(0, count, step):
        yield start, matrix[start : start + step].contiguous()


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Returns the bytes of the elements of all `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_dense_by_default(empty: Any) -> list[str]:
    """Returns transformers' choice of modules to leave dense: the head, tied modules, the last module."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return get_keys_to_not_convert(empty)
