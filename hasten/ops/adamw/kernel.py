"""Fuses an AdamW step with stochastic rounding into one pass: every element is read once and written once.

bf16 tensors are passed as int16 bit patterns, since the rounding works on bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device

BLOCK = 1024
"""Elements per program."""


@triton.jit
def _load_fp32(ptr, at, mask, HALF: tl.constexpr):
    """Loads fp32, or widens the bits of bf16 (HALF) to fp32."""
    x = tl.load(ptr + at, mask=mask, other=0)
    if HALF:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _store(ptr, at, mask, x, random_bits, HALF: tl.constexpr):
    """Stores fp32, or bf16 (HALF) stochastically rounded by the lowest 16 bits of `random_bits`. NaN is not rounded:
    its bits would overflow."""
    if HALF:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + (random_bits & 0xFFFF), bits)
        tl.store(ptr + at, (bits >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(ptr + at, x, mask=mask)


@triton.jit
def _hash(x):
    """Hashes uint32 with Wellons' lowbias32."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["N", "key", "moments_key"])
def _adamw(
    w_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    N,
    decay,
    one_minus_beta1,
    one_minus_beta2,
    bias_correction2_sqrt,
    eps,
    step_size,
    key,
    moments_key,
    HALF_W: tl.constexpr,
    HALF_G: tl.constexpr,
    HALF_M: tl.constexpr,
    HALF_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    g = _load_fp32(g_ptr, at, mask, HALF_G)
    m = _load_fp32(m_ptr, at, mask, HALF_M)
    v = _load_fp32(v_ptr, at, mask, HALF_V)
    m = m + one_minus_beta1 * (g - m)
    v = v + one_minus_beta2 * (g * g - v)
    w = decay * _load_fp32(w_ptr, at, mask, HALF_W) - step_size * (m / (tl.sqrt(v) / bias_correction2_sqrt + eps))
    index = at.to(tl.uint32)
    moment_bits = _hash(index ^ moments_key.to(tl.uint32, bitcast=True))
    _store(w_ptr, at, mask, w, _hash(index ^ key.to(tl.uint32, bitcast=True)), HALF_W)
    _store(m_ptr, at, mask, m, moment_bits, HALF_M)
    _store(v_ptr, at, mask, v, moment_bits >> 16, HALF_V)


def adamw_(
    weight_N: torch.Tensor,
    grad_N: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[float, float, float, float, float, float],
    keys: tuple[int, int],
) -> None:
    """See `ops.adamw.adamw_`; all tensors are flat and of less than 2^31 elements."""
    tensors = (weight_N, grad_N, *moments)
    halves = [x.dtype == torch.bfloat16 for x in tensors]
    bits = [x.view(torch.int16) if half else x for x, half in zip(tensors, halves, strict=True)]
    signed = (key - 2**32 if key >= 2**31 else key for key in keys)
    if weight_N.numel():
        with on_device(weight_N):
            _adamw[(triton.cdiv(weight_N.numel(), BLOCK),)](
                *bits, weight_N.numel(), *factors, *signed, *halves, BLOCK=BLOCK
            )
