"""Linears with LoRA on a GPU: few large cuBLAS matmuls, fused additions, gradients summed in fp32.

- Linears that read one input are stacked (`ops.lora.stacked`): one matmul with all W, one with all A, one gradient
each.
- Fuses the LoRA delta, the bias and the residual add into the base matmul: base = residual + bias + xa @ B is written
  first, then addmm accumulates x @ W.T onto it. The gradient of the input starts as d_xa @ A in the same way.

N tokens, E input channels, O output channels of all linears, R rank of all LoRAs. xa = x @ A.T (N, R), a = A (R, E),
b = B (R, O) with each block scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.autograd import run
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
    matmul,
    matmul_fp32,
    matmul_t,
    parameter_gradients,
    parameters,
    ranks,
    versions,
    widths,
)
from hasten.ops.norm import NormConfig, NormInput
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.lora import LoraLinear


def low_rank(
    x_NE: torch.Tensor, linears: Sequence[LoraLinear]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Computes (xa, a, b) of all linears' LoRAs together; (None, None, None) without a LoRA."""
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
    """Computes the outputs of all linears side by side (N, O), plus `residual` if given. xa, b: of `low_rank`. out:
    where to write."""
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
    # `start` may be overwritten, unless it is the caller's residual or the expanded bias.
    y = matmul(x_NE, linears, start, out if start is base else start)
    return y if bias is None else y.add_(bias)


def lora_gradients(
    linears: Sequence[LoraLinear], dy_NO: torch.Tensor, xa_NR: torch.Tensor | None, b_RO: torch.Tensor | None
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Computes (d_xa (N, R), for each linear the (O_i, R_i) fp32 gradient of scale * B); (None, []) without LoRA.

    One kernel that reads dy once, where ranks and widths suit it; else two cuBLAS matmuls.
    """
    if xa_NR is None or b_RO is None:
        return None, []
    blocks = blocks_of(linears)
    one_read = all(rank <= MAX_RANK_BACKWARD for rank in ranks(linears)) and min(widths(linears)) >= MIN_WIDTH_BACKWARD
    if not one_read or not len(dy_NO):
        d_b = matmul_fp32(xa_NR.T, dy_NO, torch.float32)
        return dy_NO @ b_RO.T, [d_b[block].T for block in blocks]
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
    """Computes d_xa @ A + dy @ W (N, E), the gradient of the input that all linears read. out: where to write."""
    if d_xa is None or a is None:
        return matmul_t(dy_NO, linears, out=out)
    dx = torch.mm(d_xa, a, out=out)
    return matmul_t(dy_NO, linears, dx, dx)


class SavedInput:
    """The saved form of a Function's input x: x itself, or the input of the norm that produced x, or neither.

    The norm's input is saved by the layer anyway (it is the residual stream), and a norm is cheap to recompute.
    """

    @staticmethod
    def tensors(x_NE: torch.Tensor, norm_input: NormInput | None, needed: bool) -> tuple[torch.Tensor | None, ...]:
        """Returns the two entries for save_for_backward. needed: whether the backward reads x at all
        (`needs_input`)."""
        if not needed:
            return None, None
        return (x_NE, None) if norm_input is None else (norm_input.x, norm_input.weight)

    @staticmethod
    def config(norm_input: NormInput | None) -> NormConfig | None:
        return None if norm_input is None else norm_input.config

    @staticmethod
    def restore(
        x: torch.Tensor | None, weight: torch.Tensor | None, config: NormConfig | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Returns x (N, E): the saved tensor, or recomputed from the norm's input, in the dtype of the matmuls (a norm
        with an fp32 weight gives fp32)."""
        if x is None or weight is None or config is None:
            return x
        return flat_rows(NormInput(x, weight, config).recompute()).to(dtype)


def needs_input(linears: Sequence[LoraLinear]) -> bool:
    """Returns whether the backward reads the linears' input: for the gradient of an A or of a weight."""
    return any(one.a is not None or one.trained_weight is not None for one in linears)


class LoraLinearsFunction(torch.autograd.Function):
    """Saves the input (see `SavedInput`), xa, a and b. `parameters(linears)` are arguments so that autograd sees
    them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, norm_input: Any, linears: Any, *_: Any
    ) -> Any:
        flat = flat_rows(x)
        xa, a, b = low_rank(flat, linears)
        y = project(flat, linears, xa, b, None if residual is None else flat_rows(residual))
        ctx.save_for_backward(*SavedInput.tensors(flat, norm_input, needs_input(linears)), xa, a, b)
        ctx.linears, ctx.versions, ctx.norm_config = linears, versions(linears), SavedInput.config(norm_input)
        ctx.shape, ctx.has_residual = x.shape, residual is not None
        return tuple(out.view(*x.shape[:-1], -1) for out in y.split(widths(linears), dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        saved_x, norm_weight, xa, a, b = ctx.saved_tensors
        check_versions(ctx.linears, ctx.versions)
        flat_grads = [flat_rows(g) for g in grads]
        dy = flat_grads[0] if len(flat_grads) == 1 else torch.cat(flat_grads, dim=1)
        d_xa, d_b = lora_gradients(ctx.linears, dy, xa, b)
        dx = input_gradient(dy, ctx.linears, d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = SavedInput.restore(saved_x, norm_weight, ctx.norm_config, dy.dtype)
        d_residual = grads[0] if ctx.has_residual else None
        return dx, d_residual, None, None, *parameter_gradients(ctx.linears, dy, flat, d_xa, d_b)


def lora_linears(
    x: torch.Tensor, linears: Sequence[LoraLinear], residual: torch.Tensor | None, norm_input: NormInput | None
) -> tuple[torch.Tensor, ...]:
    return run(LoraLinearsFunction, x, residual, norm_input, tuple(linears), *parameters(linears))
