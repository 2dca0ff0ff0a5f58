"""AdamW with stochastic rounding in plain torch, a piece at a time, so that its fp32 working copies stay small."""

import torch

PIECE = 2**20
"""Elements that are worked on at once."""


def adamw_(
    weight_N: torch.Tensor,
    grad_N: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[float, float, float, float, float, float],
    keys: tuple[int, int],
) -> None:
    """See `ops.adamw.adamw_`; all tensors are flat."""
    keep, first, second, root, eps, rate = factors
    for start in range(0, weight_N.numel(), PIECE):
        stored = [x[start : start + PIECE] for x in (weight_N, grad_N, *moments)]
        w, g, m, v = (x.float() for x in stored)
        m = m + first * (g - m)
        v = v + second * (g * g - v)
        w = keep * w - rate * (m / (v.sqrt() / root + eps))
        bits, more = (random_bits(start, len(w), key, w.device) for key in keys)
        for x, value, drawn in zip((stored[0], *stored[2:]), (w, m, v), (bits, more, more >> 16), strict=True):
            x.copy_(value if x.dtype == torch.float32 else rounded(value, drawn))


def random_bits(start: int, count: int, key: int, device: torch.device) -> torch.Tensor:
    """(count,) int32: hashes (Wellons' lowbias32) of the places start, start + 1, ... under `key`."""
    x = torch.arange(start, start + count, dtype=torch.int32, device=device) ^ _signed(key)
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ (x >> 16 & 0xFFFF)


def rounded(x_N: torch.Tensor, bits_N: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16: away from zero with the chance that the 16 bits which are cut off say. bits: the lowest 16 are used.

    Infinity stays, and what is not a number, whose bits would run over, is left as it is.
    """
    kept = x_N.view(torch.int32)
    up = kept + (bits_N & 0xFFFF)
    return (torch.where(x_N.isnan(), kept, up) & _signed(0xFFFF0000)).view(torch.float32).bfloat16()


def _signed(x: int) -> int:
    """The int32 of 32 bits."""
    return x - 2**32 if x >= 2**31 else x
