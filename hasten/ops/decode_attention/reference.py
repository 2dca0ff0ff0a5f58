"""Decode attention in plain torch: the oracle of the kernels and the path on the CPU. Materialises the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hasten.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from hasten.ops.decode_attention import CacheView


def quantised(x: torch.Tensor, dtype: torch.dtype, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns x (..., D) as `dtype` and its scales (...), fp32: the largest channel becomes `largest`."""
    scale = x.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / largest
    scaled = x.float() / scale[..., None]
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale


def write_cache(
    k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, cache: CacheView, largest: Mapping[torch.dtype, float]
) -> None:
    size, dtype = cache.blocks[0].shape[3], cache.blocks[0].dtype
    both = torch.stack((k_BTKD, v_BTKD))
    both, scales = quantised(both, dtype, largest[dtype]) if cache.scales else (both.to(dtype), None)
    slots_BT = cache.slots_B[:, None] + torch.arange(k_BTKD.shape[1], device=cache.slots_B.device)
    for index in torch.unique(slots_BT // size).tolist():
        b, t = torch.nonzero(slots_BT // size == index, as_tuple=True)
        row = slots_BT[b, t] % size
        _bytes(cache.blocks[index])[:, b, :, row] = _bytes(both)[:, b, t].transpose(0, 1)
        if scales is not None:
            cache.scales[index][:, b, :, row] = scales[:, b, t].transpose(0, 1)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """Views numbers of 8 bits as integers: torch cannot index FP8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def read_cache(cache: CacheView) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values (B, K, capacity, D), in fp32 if they are quantised, else as they are stored."""
    both = torch.cat(list(cache.blocks), dim=3)
    if cache.scales:
        both = both.float() * torch.cat(list(cache.scales), dim=3)[..., None]
    keys, values = both.unbind(0)
    return keys, values


def decode_attention(
    q_BTHD: torch.Tensor, cache: CacheView, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    tokens = q_BTHD.shape[1]
    keys, values = read_cache(cache)
    q, k, v = at_least_fp32(q_BTHD), at_least_fp32(keys), at_least_fp32(values)
    scores = torch.einsum("btkgd,bksd->bkgts", q.unflatten(2, (k.shape[1], -1)), k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    key = torch.arange(k.shape[2], device=q.device)
    query = cache.slots_B[:, None, None] + torch.arange(tokens, device=q.device)[:, None]  # (B, T, 1)
    visible = (key <= query) & (key >= cache.starts_B[:, None, None])
    if window is not None:
        visible &= key > query - window
    visible = visible[:, None, None]
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    # What was never written may be NaN, which a weight of 0 would not remove.
    v = v.where((key < cache.slots_B[:, None] + tokens)[:, None, :, None], 0.0)
    return torch.einsum("bkgts,bksd->btkgd", weights, v).flatten(2, 3).to(q_BTHD.dtype)
