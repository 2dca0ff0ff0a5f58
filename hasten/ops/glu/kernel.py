"""Fuses act(gate) * up into one pass, forward and backward; the backward recomputes the activation from gate and up.

Memory traffic: the forward reads gate and up and writes the output; the backward reads gate, up and the output's
gradient and writes the gradients of both. gate and up may be the two halves of one buffer: strided rows, contiguous
channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from hasten.ops.autograd import run
from hasten.ops.backend import on_device
from hasten.ops.rows import flat_rows

CODES = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def activate(g, CODE: tl.constexpr):
    """Returns (act(g), act'(g)) in fp32."""
    if CODE == 0:
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif CODE == 1:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif CODE == 2:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        t = _tanh(inner)
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
        return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope
    else:
        return tl.maximum(g, 0.0), tl.where(g > 0.0, 1.0, 0.0)


@triton.jit
def _glu_fwd(gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, F, CODE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_up + cols, mask=mask, other=0.0)
    act, _ = activate(gate.to(tl.float32), CODE)
    out = act.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * F + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd(
    d_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, stride_d, stride_gate, stride_up, stride_dgate, stride_dup, F,
    CODE: tl.constexpr, WRITE_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    d = tl.load(d_ptr + row * stride_d + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + cols, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * stride_up + cols, mask=mask, other=0.0)
    act, slope = activate(gate.to(tl.float32), CODE)
    wide_up = up.to(tl.float32)
    if WRITE_OUT:
        out = act.to(gate.dtype).to(tl.float32) * wide_up
        tl.store(out_ptr + row * F + cols, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + row * stride_dgate + cols, (d * wide_up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * stride_dup + cols, (d * act).to(dup_ptr.dtype.element_ty), mask=mask)


def _grid(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(2048, triton.next_power_of_2(width))
    return (triton.cdiv(width, block), rows), {"BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def glu_fwd(gate_NF: torch.Tensor, up_NF: torch.Tensor, activation: str) -> torch.Tensor:
    """Computes act(gate) * up (N, F). Channels must be contiguous. Launches at most 65535 rows at a time (the limit of
    a grid axis)."""
    rows, width = gate_NF.shape
    out = torch.empty(rows, width, device=gate_NF.device, dtype=gate_NF.dtype)
    grid, meta = _grid(rows, width)
    for start in range(0, rows, 65535):
        stop = min(start + 65535, rows)
        with on_device(gate_NF):
            _glu_fwd[(grid[0], stop - start)](
                gate_NF[start:], up_NF[start:], out[start:], gate_NF.stride(0), up_NF.stride(0), width,
                CODE=CODES[activation], **meta,
            )  # fmt: skip
    return out


def glu_bwd(
    d_NF: torch.Tensor,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    activation: str,
    into: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor | None = None,
) -> None:
    """Writes the gradients of gate and up into `into`, and the recomputed act(gate) * up into `out` if given.

    Channels must be contiguous. In place is allowed, for buffers that the caller allocated: `into` may be gate and up,
    `out` may be d.
    """
    rows, width = gate_NF.shape
    grid, meta = _grid(rows, width)
    for start in range(0, rows, 65535):
        stop = min(start + 65535, rows)
        with on_device(gate_NF):
            _glu_bwd[(grid[0], stop - start)](
                d_NF[start:], gate_NF[start:], up_NF[start:], into[0][start:], into[1][start:],
                out[start:] if out is not None else d_NF,
                d_NF.stride(0), gate_NF.stride(0), up_NF.stride(0), into[0].stride(0), into[1].stride(0), width,
                CODE=CODES[activation], WRITE_OUT=out is not None, **meta,
            )  # fmt: skip


class GluFunction(torch.autograd.Function):
    """Saves gate and up; the backward recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_fwd(flat_rows(gate), flat_rows(up), activation).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(gate.shape, device=gate.device, dtype=gate.dtype) for _ in range(2))
        width = gate.shape[-1]
        glu_bwd(
            flat_rows(d), flat_rows(gate), flat_rows(up), ctx.activation, (dgate.view(-1, width), dup.view(-1, width))
        )
        return dgate, dup, None


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return run(GluFunction, gate, up, activation)
