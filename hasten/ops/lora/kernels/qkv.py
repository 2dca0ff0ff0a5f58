"""Fuses the q, k and v projections, the q/k norm and the rotary embedding into one autograd Function.

Forward and backward each write q, k and v into one (N, O) buffer, side by side, so that the base matmul and the gradient of
the input are one matmul each. Without a q/k norm the rotation runs in place and its backward reads neither q nor k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.autograd import run
from hasten.ops.lora.kernels.linear import SavedInput, input_gradient, lora_gradients, low_rank, needs_input, project
from hasten.ops.lora.stacked import check_versions, parameter_gradients, parameters, versions, widths
from hasten.ops.rope.function import rope_config
from hasten.ops.rope.kernel import flat_tokens, qk_rope_bwd, qk_rope_fwd
from hasten.ops.rows import flat_rows

if TYPE_CHECKING:
    from hasten.ops.lora import HeadsConfig, LoraLinear
    from hasten.ops.norm import NormInput


def _heads(
    y_NO: torch.Tensor, linears: Sequence[LoraLinear], tokens: Sequence[int], dim: int
) -> tuple[torch.Tensor, ...]:
    """Views (B, T, H_i, D) of each linear's columns. tokens: (B, T). dim: channels per head."""
    return tuple(part.view(*tokens, -1, dim) for part in y_NO.split(widths(linears), dim=1))


class LoraQkvFunction(torch.autograd.Function):
    """Saves the input (see `SavedInput`), the LoRAs' xa, a and b, cos and sin, and with a q/k norm also q and k."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, wq: Any, wk: Any, norm_input: Any, linears: Any, heads: HeadsConfig, *_: Any
    ) -> Any:
        flat = flat_rows(x)
        xa, a, b = low_rank(flat, linears)
        y = project(flat, linears, xa, b)
        q, k, v = _heads(y, linears, x.shape[:2], heads.dim)
        table = None if heads.position is None else tuple(t.contiguous() for t in heads.position)
        weights = None if wq is None else (wq.contiguous(), wk.contiguous())
        rope = rope_config(heads.rotation, heads.fp32, heads.qk_norm)
        out = (q, k)
        if weights is not None:
            out = tuple(torch.empty(t.shape, device=t.device, dtype=t.dtype) for t in (q, k))
        if weights is not None or table is not None:
            qk_rope_fwd((q, k), weights, table, rope, out)
        ctx.save_for_backward(
            *SavedInput.tensors(flat, norm_input, needs_input(linears)), xa, a, b, y if weights else None,
            *(weights or (None, None)), *(table or (None, None)),
        )  # fmt: skip
        ctx.linears, ctx.versions, ctx.norm_config = linears, versions(linears), SavedInput.config(norm_input)
        ctx.rope, ctx.shape, ctx.dim = rope, x.shape, heads.dim
        return *out, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> Any:
        saved_x, norm_weight, xa, a, b, y, wq, wk, cos, sin = ctx.saved_tensors
        linears, tokens = ctx.linears, ctx.shape[:2]
        check_versions(linears, ctx.versions)
        dy = torch.empty(tokens[0] * tokens[1], sum(widths(linears)), device=dq.device, dtype=dq.dtype)
        into = _heads(dy, linears, tokens, ctx.dim)
        into[2].copy_(dv)
        d_weights = (None, None)
        if wq is not None or cos is not None:
            qk = None if y is None else _heads(y, linears, tokens, ctx.dim)[:2]
            train = wq is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
            table, weights = (None if cos is None else (cos, sin)), (None if wq is None else (wq, wk))
            d_weights = qk_rope_bwd((flat_tokens(dq), flat_tokens(dk)), qk, weights, table, ctx.rope, into[:2], train)
        else:
            into[0].copy_(dq)
            into[1].copy_(dk)
        d_xa, d_b = lora_gradients(linears, dy, xa, b)
        dx = input_gradient(dy, linears, d_xa, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        flat = SavedInput.restore(saved_x, norm_weight, ctx.norm_config, dy.dtype)
        return dx, *d_weights, None, None, None, *parameter_gradients(linears, dy, flat, d_xa, d_b)


def lora_qkv(
    x: torch.Tensor, linears: Sequence[LoraLinear], heads: HeadsConfig, norm_input: NormInput | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = (None, None) if heads.qk_norm is None else (heads.qk_norm.q_weight, heads.qk_norm.k_weight)
    return run(LoraQkvFunction, x, *weights, norm_input, tuple(linears), heads, *parameters(linears))
