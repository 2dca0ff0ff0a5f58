"""NF4 weights with double quantisation (Dettmers et al. 2023, arXiv:2305.14314), in bitsandbytes' storage layout.

matvecs_nf4(parts, x) == ops.matvec.matvecs with each weight dequantised
dequantize(w)[i] == CODE[nibble i] * scale(i // 64)
scale(b) == scale_code[scale_index[b]] * scale_of_scales[b // 256] + offset         (or absmax[b] where scales are plain)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.matvec import Part
from hasten.ops.matvec.reference import finish
from hasten.ops.nf4 import reference


@dataclass(frozen=True)
class NF4Weight:
    """The tensors of a bitsandbytes 4-bit Linear.

    packed: uint8, two 4-bit codes per byte, the first in the high half. code: (16,) fp32, the values of the codes.
    shape: (out, in). scales: absmax, (blocks,) fp32; or with double quantisation uint8 indices into scale_code (256,), with
    scale_of_scales (blocks / 256,) and offset (). block: elements per scale. scale_block: scales per scale_of_scales.
    """

    packed: torch.Tensor
    code: torch.Tensor
    shape: tuple[int, int]
    scales: torch.Tensor
    scale_code: torch.Tensor | None = None
    scale_of_scales: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    block: int = 64
    scale_block: int = 256


def dequantize_nf4(
    weight: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None = None, backend: Backend | None = None
) -> torch.Tensor:
    """Dequantises to a dense (out, in) matrix in `dtype`, or into `out` if given.

    out: (out, in) of any dtype with contiguous channels; it may be a slice of rows or columns of a larger buffer.
    """
    if backend_for(weight.packed, backend) == "triton":
        from hasten.ops.nf4.kernels import dequantize

        return dequantize.dequantize_nf4(weight, dtype, out)
    dense = reference.dequantize_nf4(weight, dtype)
    return dense if out is None else out.copy_(dense)


def matvecs_nf4(
    parts: Sequence[Part[NF4Weight]],
    x_E: torch.Tensor,
    xa_SR: torch.Tensor | None = None,
    residual_O: torch.Tensor | None = None,
    activation: str | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Returns what `ops.matvec.matvecs` returns, for NF4 matrices, with weights and sums in fp32, in x's dtype.

    Matrices whose rows end inside a block of scales, or whose blocks differ, are dequantised first. No gradients.
    """
    if backend_for(x_E, backend) == "triton":
        from hasten.ops.nf4.kernels import matvec

        weights = [part.weight for part in parts]
        if all(map(matvec.is_served, weights)) and len(set(map(matvec.layout, weights))) == 1:
            return matvec.matvecs_nf4(parts, x_E, xa_SR, residual_O, activation, x_E.dtype)
    dense = [dequantize_nf4(part.weight, torch.float32, backend=backend) for part in parts]
    return finish([w @ x_E.float() for w in dense], parts, xa_SR, residual_O, activation, x_E.dtype, x_E.dtype)
