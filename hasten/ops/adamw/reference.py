"""AdamW with stochastic rounding in plain torch, chunk by chunk, which bounds the size of its fp32 copies."""

import torch

CHUNK = 2**20
"""Elements computed at a time."""


def adamw_(
    weight_N: torch.Tensor,
    grad_N: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[float, float, float, float, float, float],
    keys: tuple[int, int],
    chunk: int = CHUNK,
) -> None:
    """See `ops.adamw.adamw_`; all tensors are flat. chunk: elements computed at a time."""
    decay, one_minus_beta1, one_minus_beta2, bias_correction2_sqrt, eps, step_size = factors
    for start in range(0, weight_N.numel(), chunk):
        stored = [x[start : start + chunk] for x in (weight_N, grad_N, *moments)]
        w, g, m, v = (x.float() for x in stored)
        m = m + one_minus_beta1 * (g - m)
        v = v + one_minus_beta2 * (g * g - v)
        w = decay * w - step_size * (m / (v.sqrt() / bias_correction2_sqrt + eps))
        bits, moment_bits = (random_bits(start, len(w), key, w.device) for key in keys)
        for x, value, drawn_bits in zip(
            (stored[0], *stored[2:]), (w, m, v), (bits, moment_bits, moment_bits >> 16), strict=True
        ):
            x.copy_(value if x.dtype == torch.float32 else rounded(value, drawn_bits))


def random_bits(start: int, count: int, key: int, device: torch.device) -> torch.Tensor:
    """Returns (count,) int32: hashes (Wellons' lowbias32) of the indices start, start + 1, ... under `key`."""
    x = torch.arange(start, start + count, dtype=torch.int32, device=device) ^ _signed(key)
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def rounded(x_N: torch.Tensor, bits_N: torch.Tensor) -> torch.Tensor:
    """Rounds fp32 to bf16 stochastically: away from zero with probability (16 low bits) / 2**16, else towards zero.

    bits: random; the lowest 16 are used. Infinity and NaN stay (the bits of a NaN would overflow).
    """
    as_int = x_N.view(torch.int32)
    up = as_int + (bits_N & 0xFFFF)
    return (torch.where(x_N.isnan(), as_int, up) & _signed(0xFFFF0000)).view(torch.float32).bfloat16()


def _signed(x: int) -> int:
    """Reinterprets the 32 bits of x as int32."""
    return x - 2**32 if x >= 2**31 else x
