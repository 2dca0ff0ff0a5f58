"""`WeightFormat`: one way of holding a Linear's weight. A new format is one file here and one line in the registry."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.ops.lora import Weight


@dataclass(frozen=True)
class QuantizedTensor:
    """What a format stores for one weight. tensors: suffix -> tensor ("" = under the weight's own name, ".absmax", ...).
    dense: (out, in), the values that the stored weight stands for."""

    tensors: Mapping[str, torch.Tensor]
    dense: torch.Tensor


@dataclass(frozen=True)
class LoadPlan:
    """How to quantise while a checkpoint is read.

    config: what transformers' from_pretrained takes as quantization_config; None = the format converts Linears itself
    (`convert`, `fill`). kept_dense: names of Linears that stay dense. notes: lines for the report.
    """

    config: Any = None
    kept_dense: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)


class WeightFormat(ABC):
    """A stateless description; every function takes the Linear or the tensor that it is about.

    name: in reports and notes. load_argument: the `from_pretrained` argument that asks for it (None = none does).
    choice: as `hasten ... --load` and `estimate(quantization=)` spell it, None = not offered. save_method: as
    `save_pretrained_merged` spells it, None = cannot be written. bits: of one weight, scales left out.
    exact: whether a dense checkpoint's values survive. trainable: whether the weight itself can train.
    package, extra: what must be installed, and the extra of hasten that installs it.
    """

    name: ClassVar[str]
    load_argument: ClassVar[str | None] = None
    choice: ClassVar[str | None] = None
    save_method: ClassVar[str | None] = None
    bits: ClassVar[int] = 16
    exact: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    package: ClassVar[str | None] = None
    extra: ClassVar[str | None] = None

    # What a live Linear holds

    @abstractmethod
    def matches(self, linear: nn.Module) -> bool:
        """Whether this Linear (the base layer, without PEFT's wrapper) holds its weight so."""

    @abstractmethod
    def weight(self, linear: Any) -> Weight | str:
        """The weight as `ops.lora` takes it, or the reason why the module's own forward must run."""

    @abstractmethod
    def dequantize(self, linear: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as an (out, in) matrix; None = the dtype that the layer computes with."""

    @abstractmethod
    def holds(self, linear: Any, dense: torch.Tensor) -> bool:
        """Whether the stored weight is what quantising `dense` (out, in) gives: it was not changed since."""

    @abstractmethod
    def stored_bytes(self, linear: Any) -> int:
        """Bytes of the weight and its scales as they are held, the bias left out."""

    # Sizes before anything is loaded

    @abstractmethod
    def bytes_for(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes of a (rows, columns) weight once loaded. itemsize: of the compute dtype."""

    # Loading

    def stored_in(self, record: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's `quantization_config` says that its weights are stored in this format."""
        return False

    def problems_on_load(self, empty: nn.Module, on_cpu: bool, kept_dense: Sequence[str]) -> list[str]:
        """Why a checkpoint that is stored in this format cannot run there."""
        return []

    def plan_load(self, empty: nn.Module, dtype: torch.dtype, on_cpu: bool) -> LoadPlan:
        """How to quantise a dense checkpoint into this format while it is read. empty: the model on the meta device."""
        return LoadPlan()

    def fill(self, linear: Any, rows: Any) -> None:
        """Quantises a stored matrix into an empty Linear of this format on the CPU, some rows at a time.

        rows: safetensors' slice of the (out, in) matrix; nothing of it is read before it is indexed.
        """
        raise NotImplementedError(f"{self.name} is not quantised row by row")

    # Export

    def quantize(self, dense: torch.Tensor) -> QuantizedTensor:
        """`dense` (out, in) as this format stores it in a checkpoint."""
        raise NotImplementedError(f"{self.name} is not written")

    def export_config(self, dtype: torch.dtype, kept_dense: Sequence[str]) -> dict[str, Any] | None:
        """The `quantization_config` of a checkpoint with weights in this format; None for dense ones."""
        return None
