"""Stacks linears that read one input, so that forward and backward run one large matmul instead of several small ones.

With W = [W_1; W_2; ...], A = [A_1; A_2; ...] and B = block_diag(scale_1 * B_1.T, scale_2 * B_2.T, ...):
    y == base + x @ W.T + (x @ A.T) @ B            y's columns are the linears' outputs, side by side

N tokens, E input channels, O output channels of all linears together, R rank of all LoRAs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hasten.ops.lora.weight import mm

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear


def matmul_fp32(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Computes left @ right in `dtype`. An fp32 result of 16-bit inputs is never rounded to 16 bits on the way."""
    if left.is_cuda and left.dtype != torch.float32 and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(dtype)


def parameters(linears: Sequence[LoraLinear]) -> list[torch.Tensor | None]:
    """Returns the tensors that autograd must see, four per linear: A, B, and the weight and bias where they train."""
    return [t for one in linears for t in (one.a, one.b, one.trained_weight, one.trained_bias)]


def versions(linears: Sequence[LoraLinear]) -> tuple[int, ...]:
    """Returns autograd's version counters of the tensors that a backward reads again: A, B and stored weights."""
    read = [t for one in linears for t in (one.a, one.b, one.weight.stored) if t is not None]
    return tuple(t._version for t in read if not t.is_inference())


def check_versions(linears: Sequence[LoraLinear], before: tuple[int, ...]) -> None:
    """Raises RuntimeError if a weight was changed since the forward, as autograd does for the tensors that it saves."""
    if versions(linears) != before:
        raise RuntimeError(
            "a weight of a linear was changed in place between forward and backward, and the backward needs the value of the "
            "forward: run the backward before the optimizer step, or run the forward again"
        )


@dataclass(frozen=True)
class Adapters:
    """All LoRAs of stacked linears: a (R, E), and b (R, O) scaled and transposed, both in the dtype of the matmuls."""

    a: torch.Tensor
    b: torch.Tensor


def widths(linears: Sequence[LoraLinear]) -> list[int]:
    """Returns the output channels of each linear."""
    return [one.weight.shape[0] for one in linears]


def ranks(linears: Sequence[LoraLinear]) -> list[int]:
    """Returns the rank of each linear's LoRA, 0 without one."""
    return [0 if one.a is None else one.a.shape[0] for one in linears]


def blocks_of(linears: Sequence[LoraLinear]) -> list[tuple[slice, slice]]:
    """Returns (ranks, output channels) of each linear in the stacked (R, O) matrix."""
    found, row, column = [], 0, 0
    for rank, width in zip(ranks(linears), widths(linears), strict=True):
        found.append((slice(row, row + rank), slice(column, column + width)))
        row, column = row + rank, column + width
    return found


def adapters(linears: Sequence[LoraLinear], dtype: torch.dtype) -> Adapters | None:
    """Stacks A and B of all LoRAs; None where no linear has one."""
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


def matmul(
    x_NE: torch.Tensor,
    linears: Sequence[LoraLinear],
    add_to: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes x @ [W_1; W_2; ...].T (N, O), plus `add_to` (N, O) if given. out: where to write; it may be `add_to`."""
    if len(linears) == 1:
        return linears[0].weight.matmul(x_NE, add_to, out)
    if not any(one.weight.overrides_matmul for one in linears):
        return mm(x_NE, weight_of(linears, x_NE.dtype).T, add_to, out)
    out = x_NE.new_empty(x_NE.shape[0], sum(widths(linears))) if out is None else out
    for one, (_, columns) in zip(linears, blocks_of(linears), strict=True):
        part = out[:, columns]
        base = part if add_to is out else None if add_to is None else add_to[:, columns]
        one.weight.matmul(x_NE, base, part)
    return out


def matmul_t(
    dy_NO: torch.Tensor,
    linears: Sequence[LoraLinear],
    add_to: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes dy @ [W_1; W_2; ...] (N, E), plus `add_to` (N, E) if given. out: where to write; it may be `add_to`."""
    if len(linears) == 1:
        return linears[0].weight.matmul_t(dy_NO, add_to, out)
    if not any(one.weight.overrides_matmul for one in linears):
        return mm(dy_NO, weight_of(linears, dy_NO.dtype), add_to, out)
    total = add_to
    for one, (_, columns) in zip(linears, blocks_of(linears), strict=True):
        total = one.weight.matmul_t(dy_NO[:, columns], total, out)
        out = total
    assert total is not None
    return total


def weight_of(linears: Sequence[LoraLinear], dtype: torch.dtype) -> torch.Tensor:
    """Returns [W_1; W_2; ...] in `dtype`: a view where the weights are packed in one buffer, else a new buffer."""
    if len(linears) == 1:
        return linears[0].weight.dense(dtype)
    view = stacked_view([one.weight.stored for one in linears])
    if view is not None and view.dtype == dtype:
        return view
    shapes = widths(linears)
    whole = torch.empty(sum(shapes), linears[0].weight.shape[1], device=linears[0].weight.device, dtype=dtype)
    for one, rows in zip(linears, whole.split(shapes), strict=True):
        one.weight.write(rows)
    return whole


def stacked_view(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Returns one view over matrices of one dtype that follow each other in one storage (packed), or None."""
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
    """Concatenates all biases (O,), with zeros for a linear without one; None where no linear has one."""
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
    """Computes the gradients of `parameters(linears)`, summed over tokens in fp32, each in its parameter's dtype.

    x: the linears' input, or None where neither a LoRA nor a weight trains. d_xa: gradient of x @ A.T (N, R).
    d_bs: for each linear the (O_i, R_i) gradient of scale * B.
    """
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
