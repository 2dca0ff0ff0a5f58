"""Several linears that read one input as one: a tall matrix, all A on top of each other, all B on one diagonal.

With W = [W_1; W_2; ...], A = [A_1; A_2; ...] and B = diag(scale_1 * B_1.T, scale_2 * B_2.T, ...):
    y == base + x @ W.T + (x @ A.T) @ B            y's columns are the linears' outputs side by side
so that products are few and large, and so are those of the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear


def matmul_fp32(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right summed in fp32, in `dtype`: no 16-bit rounding on the way into an fp32 gradient."""
    if left.is_cuda and left.dtype != torch.float32 and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def parameters(linears: Sequence[LoraLinear]) -> list[torch.Tensor | None]:
    """What autograd must see, four a linear: A, B, and the weight and bias where they train."""
    return [t for one in linears for t in (one.a, one.b, one.trained_weight, one.trained_bias)]


def versions(linears: Sequence[LoraLinear]) -> tuple[int, ...]:
    """How often what a backward reads again was changed in place so far, as autograd counts it."""
    read = [t for one in linears for t in (one.a, one.b, one.weight.held) if t is not None]
    return tuple(t._version for t in read if not t.is_inference())


def check_versions(linears: Sequence[LoraLinear], before: tuple[int, ...]) -> None:
    """Raises RuntimeError where a weight was changed since the forward, as autograd does for tensors that it keeps itself."""
    if versions(linears) != before:
        raise RuntimeError(
            "a weight of a linear was changed in place between its forward and its backward, which reads it again: take the "
            "backward first, or run the forward anew"
        )


@dataclass(frozen=True)
class Adapters:
    """a (R, E) and b (R, O), scaled, in the products' dtype; R is the sum of all ranks, O of all widths."""

    a: torch.Tensor
    b: torch.Tensor


def widths(linears: Sequence[LoraLinear]) -> list[int]:
    return [one.weight.shape[0] for one in linears]


def ranks(linears: Sequence[LoraLinear]) -> list[int]:
    return [0 if one.a is None else one.a.shape[0] for one in linears]


def blocks_of(linears: Sequence[LoraLinear]) -> list[tuple[slice, slice]]:
    """Where each linear's own block lies in the (R, O) diagonal."""
    found, row, column = [], 0, 0
    for rank, width in zip(ranks(linears), widths(linears), strict=True):
        found.append((slice(row, row + rank), slice(column, column + width)))
        row, column = row + rank, column + width
    return found


def adapters(linears: Sequence[LoraLinear], dtype: torch.dtype) -> Adapters | None:
    """Both matrices of all LoRAs together, or None where there is none."""
    with_lora = [one.a for one in linears if one.a is not None]
    if not with_lora:
        return None
    a = torch.cat(with_lora).to(dtype) if len(with_lora) > 1 else with_lora[0].to(dtype)
    shape = (a.shape[0], sum(widths(linears)))
    b = torch.empty(shape, device=a.device, dtype=dtype) if len(linears) == 1 else a.new_zeros(shape)
    for one, block in zip(linears, blocks_of(linears), strict=True):
        if one.b is not None:
            torch.mul(one.b.T, one.scale, out=b[block])
    return Adapters(a, b)


def weight_of(linears: Sequence[LoraLinear], dtype: torch.dtype) -> torch.Tensor:
    """[W_1; W_2; ...] in `dtype`: a view where the weights lie behind each other in memory, else a new buffer."""
    if len(linears) == 1:
        return linears[0].weight.dense(dtype)
    view = stacked_view([one.weight.held for one in linears])
    if view is not None and view.dtype == dtype:
        return view
    shapes = widths(linears)
    whole = torch.empty(sum(shapes), linears[0].weight.shape[1], device=linears[0].weight.device, dtype=dtype)
    for one, rows in zip(linears, whole.split(shapes), strict=True):
        one.weight.write(rows)
    return whole


def stacked_view(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """One view over matrices of one dtype that follow each other in one storage, or None."""
    first, end = tensors[0], None
    if first is None:
        return None
    for one in tensors:
        if one is None or one.dtype != first.dtype or not one.is_contiguous():
            return None
        if one.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        if end is not None and one.storage_offset() != end:
            return None
        end = one.storage_offset() + one.numel()
    rows = sum(one.shape[0] for one in tensors if one is not None)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def bias_of(linears: Sequence[LoraLinear], dtype: torch.dtype) -> torch.Tensor | None:
    """All biases side by side (O,), zeros where a linear has none; None where none has."""
    if all(one.bias is None for one in linears):
        return None
    parts = [
        torch.zeros(one.weight.shape[0], device=one.weight.device, dtype=dtype)
        if one.bias is None
        else one.bias.to(dtype)
        for one in linears
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def parameter_gradients(
    linears: Sequence[LoraLinear],
    dy_NO: torch.Tensor,
    x_NE: torch.Tensor | None,
    d_xa: torch.Tensor | None,
    d_bs: Sequence[torch.Tensor],
) -> list[Any]:
    """The gradients of `parameters(linears)`. d_bs: each linear's (O_i, R_i), of B before it was scaled."""
    d_a = None
    if d_xa is not None and x_NE is not None:
        kind = next(one.a.dtype for one in linears if one.a is not None)
        d_a = matmul_fp32(d_xa.T, x_NE, kind)
    found: list[Any] = []
    for index, (one, (rows, columns)) in enumerate(zip(linears, blocks_of(linears), strict=True)):
        if one.a is None or one.b is None or d_a is None:
            found += [None, None]
        else:
            found += [d_a[rows].to(one.a.dtype), (d_bs[index] * one.scale).to(one.b.dtype)]
        weight, bias, mine = one.trained_weight, one.trained_bias, dy_NO[:, columns]
        found.append(None if weight is None or x_NE is None else matmul_fp32(mine.T, x_NE, weight.dtype))
        found.append(None if bias is None else mine.sum(0, dtype=torch.float32).to(bias.dtype))
    return found
