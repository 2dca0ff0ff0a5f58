"""`Weight`: the (out, in) matrix of a Linear in any storage format, and the matmuls that the LoRA ops run with it.

weight.matmul(x_NE)     == x @ W.T        the forward
weight.matmul_t(dy_NO)  == dy @ W         the gradient of the input
type.matvecs(...)       == W_i @ x        one token, several weights in one launch, when decoding

N tokens, E input channels, O output channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from hasten.ops.matvec import Part, matvecs
from hasten.ops.matvec.reference import finish
from hasten.ops.precision import at_least_fp32


def mm(left: torch.Tensor, right: torch.Tensor, add_to: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    """Computes left @ right, plus `add_to` if given, in one cuBLAS call. out: where to write; it may be `add_to`."""
    if add_to is None:
        return torch.mm(left, right, out=out)
    if out is add_to:
        return add_to.addmm_(left, right)
    return torch.addmm(add_to, left, right, out=out)


class Weight(ABC):
    """The matrix W of a Linear. A storage format implements `shape`, `device` and `dense`, and, if it can, faster
    matmuls.

    stored: the tensor itself where W is stored as a plain matrix, else None. Only that tensor can train, be changed in
    place, or be packed with others into one buffer.
    overrides_matmul: whether this format multiplies without a dense copy of W (FP8 tensor cores, a fused int4 kernel).
    Then the ops call `matmul` and `matmul_t` of each weight separately. False: linears that read one input are stacked
    into one dense matrix, for one large matmul.
    """

    overrides_matmul: ClassVar[bool] = False
    stored: torch.Tensor | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, E): output channels, input channels."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the matrix is stored, and where the matmuls run."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns W (O, E) in `dtype`: a dequantised copy, or the stored tensor itself if it has that dtype."""

    def write(self, out: torch.Tensor) -> None:
        """Writes W into `out` (O, E), in out's dtype. out: contiguous channels, possibly part of a larger buffer."""
        out.copy_(self.dense(out.dtype).detach())

    def matmul(
        self, x_NE: torch.Tensor, add_to: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes x @ W.T (N, O) in x's dtype, plus `add_to` if given, inside the matmul.

        x: contiguous channels; its rows may be slices of a wider buffer.
        add_to: (N, O); a bias comes expanded (row stride 0). out: where to write, (N, O) with contiguous channels; it
        may be `add_to`.
        """
        return mm(x_NE, self.dense(x_NE.dtype).T, add_to, out)

    def matmul_t(
        self, dy_NO: torch.Tensor, add_to: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes dy @ W (N, E) in dy's dtype, plus `add_to` if given, inside the matmul. add_to, out: as in
        `matmul`."""
        return mm(dy_NO, self.dense(dy_NO.dtype), add_to, out)

    @classmethod
    def matvecs(
        cls,
        parts: Sequence[Part[Any]],
        x_E: torch.Tensor,
        xa_SR: torch.Tensor | None = None,
        residual_O: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """Computes what `ops.matvec.matvecs` does, in x's dtype, for parts whose weights are of this class. No gradients.

        A format with a kernel of its own for one token overrides it.
        """
        products = [at_least_fp32(part.weight.matmul(x_E[None])[0]) for part in parts]
        return finish(products, parts, xa_SR, residual_O, activation, x_E.dtype, x_E.dtype)


@dataclass(frozen=True)
class DenseWeight(Weight):
    """A weight that is stored as a plain (O, E) matrix of any floating dtype."""

    stored: torch.Tensor = field()  # required, in spite of Weight's default

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.stored.to(dtype)

    def write(self, out: torch.Tensor) -> None:
        out.copy_(self.stored.detach())

    @classmethod
    def matvecs(
        cls,
        parts: Sequence[Part[Any]],
        x_E: torch.Tensor,
        xa_SR: torch.Tensor | None = None,
        residual_O: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        dense = [replace(part, weight=part.weight.stored) for part in parts]
        if any(part.weight.stride(1) != 1 for part in dense):
            return super().matvecs(parts, x_E, xa_SR, residual_O, activation)
        return matvecs(dense, x_E, xa_SR, residual_O, activation)
