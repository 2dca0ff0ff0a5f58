"""Fuses RMSNorm and LayerNorm into one pass, forward and backward. One program holds one row (N, D) in registers.

Memory traffic: the forward reads x (and a residual) and writes y; the backward reads dy and x (and the gradient of the
residual stream) and writes dx. Saved: x and one or two fp32 statistics per row. The weight's gradient, where it
trains, is summed per program in fp32; a second, small pass sums over the programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from hasten.ops.autograd import run
from hasten.ops.backend import on_device
from hasten.ops.norm.config import NormConfig
from hasten.ops.rows import flat_rows


@triton.jit
def _norm_fwd(
    x_ptr,
    w_ptr,
    base_ptr,
    y_ptr,
    rstd_ptr,
    mean_ptr,
    stride_x,
    stride_base,
    D,
    HEADS,
    eps,
    LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    FP32_WEIGHT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    if LAYER:
        mean = tl.sum(wide, axis=0) / D
        wide = tl.where(mask, wide - mean, 0.0)
        tl.store(mean_ptr + row, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    w = tl.load(w_ptr + (row % HEADS) * D + cols, mask=mask, other=0.0)
    normed = wide * rstd
    if FP32_WEIGHT:
        scale = w.to(tl.float32)
        if UNIT_OFFSET:
            scale = 1.0 + scale
        y = normed * scale
    else:
        if UNIT_OFFSET:
            w = (1.0 + w.to(tl.float32)).to(w.dtype)
        y = normed.to(x.dtype).to(tl.float32) * w.to(tl.float32)
    if ADD:
        base = tl.load(base_ptr + row * stride_base + cols, mask=mask, other=0.0).to(tl.float32)
        y = base + y.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * D + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "STEP"])
def _norm_bwd(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    mean_ptr,
    dsum_ptr,
    dx_ptr,
    dw_ptr,
    stride_dy,
    stride_x,
    rows,
    D,
    HEADS,
    STEP,
    LAYER: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ADD: tl.constexpr,
    TRAIN_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes dx and the weight's gradient. Program p takes rows p, p + STEP, ...; STEP is a multiple of HEADS, so
    all of them have the weight of one head."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    w = tl.load(w_ptr + (program % HEADS) * D + cols, mask=mask, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w = 1.0 + w
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    row = program
    while row < rows:
        dy = tl.load(dy_ptr + row * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if LAYER:
            x = tl.where(mask, x - tl.load(mean_ptr + row), 0.0)
        normed = x * rstd
        g = dy * w
        centre = tl.sum(g * normed, axis=0) / D
        dx = g - normed * centre
        if LAYER:
            dx = dx - tl.sum(g, axis=0) / D
        dx = dx * rstd
        if ADD:
            dx += tl.load(dsum_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if TRAIN_W:
            dw += dy * normed
        row += STEP
    if TRAIN_W:
        tl.store(dw_ptr + program * D + cols, dw, mask=mask)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def norm_fwd(
    x_ND: torch.Tensor, weight: torch.Tensor, config: NormConfig, base_ND: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (y, rstd, mean). Channels must be contiguous. base: a residual in y's dtype; y is rounded to that dtype,
    then added to it."""
    rows, width = x_ND.shape
    dtype = x_ND.dtype if config.fp32_weight else torch.promote_types(x_ND.dtype, weight.dtype)
    y = torch.empty(rows, width, device=x_ND.device, dtype=dtype)
    rstd = torch.empty(rows, device=x_ND.device, dtype=torch.float32)
    mean = torch.empty_like(rstd) if config.kind == "layer" else rstd
    block = triton.next_power_of_2(width)
    if rows:
        with on_device(x_ND):
            _norm_fwd[(rows,)](
                x_ND, weight, x_ND if base_ND is None else base_ND, y, rstd, mean, x_ND.stride(0),
                0 if base_ND is None else base_ND.stride(0), width, weight.numel() // width, config.eps,
                LAYER=config.kind == "layer", UNIT_OFFSET=config.unit_offset, FP32_WEIGHT=config.fp32_weight, ADD=base_ND is not None,
                BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return y, rstd, mean


def norm_bwd(
    dy_ND: torch.Tensor,
    x_ND: torch.Tensor,
    weight: torch.Tensor,
    stats: tuple[torch.Tensor, torch.Tensor],
    config: NormConfig,
    dsum_ND: torch.Tensor | None,
    train_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes (dx, dw or None). dsum: the gradient that reaches x on the residual path, added to dx in the same
    pass."""
    rows, width = x_ND.shape
    heads = weight.numel() // width
    dx = torch.empty(rows, width, device=x_ND.device, dtype=x_ND.dtype)
    block = triton.next_power_of_2(width)
    programs = rows if not train_weight else min(rows, heads * max(1, 512 // heads))
    programs -= programs % heads
    dw = torch.empty(programs, width, device=x_ND.device, dtype=torch.float32) if train_weight else dx
    if rows:
        with on_device(x_ND):
            _norm_bwd[(programs,)](
                dy_ND, x_ND, weight, *stats, dsum_ND if dsum_ND is not None else dx, dx, dw, dy_ND.stride(0), x_ND.stride(0),
                rows, width, heads, programs,
                LAYER=config.kind == "layer", UNIT_OFFSET=config.unit_offset, ADD=dsum_ND is not None, TRAIN_W=train_weight,
                BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    if not train_weight:
        return dx, None
    return dx, dw.view(-1, heads, width).sum(0).view(weight.shape).to(weight.dtype)


def _forward(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor, config: NormConfig, base: torch.Tensor | None
) -> torch.Tensor:
    """Computes norm(x), plus `base` if given. Saves x, rstd and, for LayerNorm, the mean."""
    flat = flat_rows(x)
    y, rstd, mean = norm_fwd(flat, weight.contiguous(), config, None if base is None else flat_rows(base))
    ctx.save_for_backward(flat, weight, rstd, mean)
    ctx.config = config
    return y.view(x.shape)


class NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, config: NormConfig) -> torch.Tensor:
        return _forward(ctx, x, weight, config, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return *_backward(ctx, dy, None), None


class NormWithResidualFunction(torch.autograd.Function):
    """Returns (norm(x), x); the norm's backward adds the two gradients of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, config: NormConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward(ctx, x, weight, config, None), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, d_residual: torch.Tensor) -> Any:
        return *_backward(ctx, dy, flat_rows(d_residual).contiguous()), None


class AddNormFunction(torch.autograd.Function):
    """Computes residual + norm(x) in one pass; the gradient of the residual is the output's."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, config: NormConfig
    ) -> torch.Tensor:
        return _forward(ctx, x, weight, config, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        return *_backward(ctx, dy, None), dy, None


def _backward(ctx: Any, dy: torch.Tensor, d_residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    flat, weight, rstd, mean = ctx.saved_tensors
    train = ctx.needs_input_grad[1]
    dx, dw = norm_bwd(flat_rows(dy), flat, weight.contiguous(), (rstd, mean), ctx.config, d_residual, train)
    return dx.view(dy.shape), dw


def norm(x: torch.Tensor, weight: torch.Tensor, config: NormConfig) -> torch.Tensor:
    return run(NormFunction, x, weight, config)


def norm_with_residual(x: torch.Tensor, weight: torch.Tensor, config: NormConfig) -> tuple[torch.Tensor, torch.Tensor]:
    return run(NormWithResidualFunction, x, weight, config)


def add_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, config: NormConfig) -> torch.Tensor:
    return run(AddNormFunction, x, weight, residual, config)
