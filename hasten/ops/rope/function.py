"""The autograd Function of q/k norm and rotary embedding, around the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from hasten.ops.autograd import run
from hasten.ops.norm import NormConfig
from hasten.ops.rope.kernel import RopeConfig, flat_tokens, qk_rope_bwd, qk_rope_fwd

if TYPE_CHECKING:
    from hasten.ops.rope import QKNorm


class QKRopeFunction(torch.autograd.Function):
    """Saves cos and sin; with a q/k norm also its inputs q and k."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, wq: Any, wk: Any, cos: Any, sin: Any, config: RopeConfig) -> Any:
        q, k = flat_tokens(q), flat_tokens(k)
        out = (
            torch.empty(q.shape, device=q.device, dtype=q.dtype),
            torch.empty(k.shape, device=k.device, dtype=k.dtype),
        )
        table = None if cos is None else (cos.contiguous(), sin.contiguous())
        weights = None if wq is None else (wq.contiguous(), wk.contiguous())
        qk_rope_fwd((q, k), weights, table, config, out)
        ctx.save_for_backward(
            *((q, k) if weights else (None, None)), *(weights or (None, None)), *(table or (None, None))
        )
        ctx.config = config
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        q, k, wq, wk, cos, sin = ctx.saved_tensors
        d = (flat_tokens(dq), flat_tokens(dk))
        out = (
            torch.empty(d[0].shape, device=dq.device, dtype=dq.dtype),
            torch.empty(d[1].shape, device=dk.device, dtype=dk.dtype),
        )
        train = wq is not None and (ctx.needs_input_grad[2] or ctx.needs_input_grad[3])
        table = None if cos is None else (cos, sin)
        d_weights = qk_rope_bwd(
            d, None if q is None else (q, k), None if wq is None else (wq, wk), table, ctx.config, out, train
        )
        return *out, *d_weights, None, None, None


def qk_rope(
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    position: tuple[torch.Tensor, torch.Tensor] | None,
    rotation: str,
    fp32: bool,
    qk_norm: QKNorm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = position if position is not None else (None, None)
    weights = (None, None) if qk_norm is None else (qk_norm.q_weight, qk_norm.k_weight)
    return run(QKRopeFunction, q_BTHD, k_BTHD, *weights, cos, sin, rope_config(rotation, fp32, qk_norm))


def rope_config(rotation: str, fp32: bool, qk_norm: QKNorm | None) -> RopeConfig:
    return RopeConfig(rotation == "interleaved", fp32, NormConfig(0.0) if qk_norm is None else qk_norm.config)
