"""LoRA that costs little: products by cuBLAS, few and large, what lies between them in few passes, gradients summed in fp32.

- Linears that read one input are one product (see `stacked`), and so are all A, all B and their gradients.
- A residual, a bias and B's share are laid down in one pass, and the product adds itself to them; the input's gradient
  likewise starts as d(x @ A.T) @ A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.lora.kernels.lora_delta import (
    MAX_RANK,
    MAX_RANK_BACKWARD,
    MIN_WIDTH_BACKWARD,
    add_lora_delta,
    lora_delta_bwd,
)
from hasten.ops.lora.stacked import (
    adapters,
    bias_of,
    blocks_of,
    check_versions,
    matmul_fp32,
    parameter_gradients,
    parameters,
    ranks,
    versions,
    weight_of,
    widths,
)
from hasten.ops.norm import NormConfig, NormInput
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear


def low_rank(
    x_NE: torch.Tensor, linears: Sequence[LoraLinear]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(x @ A.T (N, R), A (R, E), B (R, O) scaled) of all linears' LoRAs together; three times None without any."""
    found = adapters(linears, x_NE.dtype)
    return (None, None, None) if found is None else (x_NE @ found.a.T, found.a, found.b)


def project(
    x_NE: torch.Tensor,
    linears: Sequence[LoraLinear],
    xa: torch.Tensor | None,
    b: torch.Tensor | None,
    residual_NO: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """All linears' outputs (N, O) side by side, on top of `residual` where given. xa, b: of `low_rank`. out: where to write."""
    bias = bias_of(linears, x_NE.dtype)
    base = residual_NO
    if base is None and bias is not None:
        base, bias = bias.expand(x_NE.shape[0], -1), None
    start = base
    if xa is not None and b is not None:
        if base is None:
            start = torch.mm(xa, b, out=out)
        elif b.shape[0] <= MAX_RANK:
            start = add_lora_delta(base, xa, b, out)
        else:
            start = torch.addmm(base, xa, b, out=out)
    weight = weight_of(linears, x_NE.dtype)
    if start is None:
        y = torch.mm(x_NE, weight.T, out=out)
    elif start is base:
        y = torch.addmm(start, x_NE, weight.T, out=out)
    else:
        y = start.addmm_(x_NE, weight.T)
    return y if bias is None else y.add_(bias)


def thin_gradients(
    linears: Sequence[LoraLinear], dy_NO: torch.Tensor, xa_NR: torch.Tensor | None, b_RO: torch.Tensor | None
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """d(x @ A.T) (N, R), and for each linear the (O_i, R_i) gradient, fp32, of its B before it was scaled."""
    if xa_NR is None or b_RO is None:
        return None, []
    blocks = blocks_of(linears)
    one_read = all(rank <= MAX_RANK_BACKWARD for rank in ranks(linears)) and min(widths(linears)) >= MIN_WIDTH_BACKWARD
    if not one_read or not len(dy_NO):
        tall = matmul_fp32(xa_NR.T, dy_NO, torch.float32)
        return dy_NO @ b_RO.T, [tall[block].T for block in blocks]
    d_xa, d_bs = torch.empty_like(xa_NR), []
    for rows, columns in blocks:
        if rows.start == rows.stop:
            d_bs.append(b_RO[rows, columns].T)
            continue
        d_xa_own, d_b = lora_delta_bwd(dy_NO[:, columns], xa_NR[:, rows], b_RO[rows, columns])
        d_xa[:, rows] = d_xa_own
        d_bs.append(d_b)
    return d_xa, d_bs


def input_gradient(
    dy_NO: torch.Tensor,
    linears: Sequence[LoraLinear],
    d_xa: torch.Tensor | None,
    a: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient (N, E) of the input that all linears read. out: where to write."""
    weight = weight_of(linears, dy_NO.dtype)
    if d_xa is None or a is None:
        return torch.mm(dy_NO, weight, out=out)
    return torch.mm(d_xa, a, out=out).addmm_(dy_NO, weight)


class SavedInput:
    """What every Function here keeps of its input: the input, or what its norm acts it from, or nothing."""

    @staticmethod
    def tensors(x_NE: torch.Tensor, norm_input: NormInput | None, needed: bool) -> tuple[torch.Tensor | None, ...]:
        if not needed:
            return None, None
        return (x_NE, None) if norm_input is None else (norm_input.x, norm_input.weight)

    @staticmethod
    def rule(norm_input: NormInput | None) -> NormConfig | None:
        return None if norm_input is None else norm_input.rule

    @staticmethod
    def rows(
        x: torch.Tensor | None, weight: torch.Tensor | None, rule: NormConfig | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The input's rows again, in the products' dtype: a norm with an fp32 weight gives fp32 rows."""
        if x is None or weight is None or rule is None:
            return x
        return flat_rows(NormInput(x, weight, rule).again()).to(dtype)


def needs_input(linears: Sequence[LoraLinear]) -> bool:
    return any(one.a is not None or one.trained_weight is not None for one in linears)


class LoraLinearsFunction(torch.autograd.Function):
    """Parameters come in as arguments only so that autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, norm_input: Any, linears: Any, *_: Any
    ) -> Any:
        flat = flat_rows(x)
        xa, a, b = low_rank(flat, linears)
        y = project(flat, linears, xa, b, None if residual is None else flat_rows(residual))
        ctx.save_for_backward(*SavedInput.tensors(flat, norm_input, needs_input(linears)), xa, a, b)
        ctx.linears, ctx.versions, ctx.rule = linears, versions(linears), SavedInput.rule(norm_input)
        ctx.shape, ctx.has_residual = x.shape, residual is not None
        return tuple(out.view(*x.shape[:-1], -1) for out in y.split(widths(linears), dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        source, norm_weight, xa, a, b = ctx.saved_tensors
        check_versions(ctx.linears, ctx.versions)
        rows = [flat_rows(g) for g in grads]
        dy = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        d_xa, d_b = thin_gradients(ctx.linears, dy, xa, b)
        dx = input_gradient(dy, ctx.linears, d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = SavedInput.rows(source, norm_weight, ctx.rule, dy.dtype)
        d_residual = grads[0] if ctx.has_residual else None
        return dx, d_residual, None, None, *parameter_gradients(ctx.linears, dy, flat, d_xa, d_b)


def lora_linears(
    x: torch.Tensor, linears: Sequence[LoraLinear], residual: torch.Tensor | None, norm_input: NormInput | None
) -> tuple[torch.Tensor, ...]:
    return LoraLinearsFunction.apply(x, residual, norm_input, tuple(linears), *parameters(linears))  # pyright: ignore[reportReturnType]
