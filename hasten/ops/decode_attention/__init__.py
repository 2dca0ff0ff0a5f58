"""Attention of a few new tokens over a cache of keys and values that grows in blocks, without copying what it holds.

out[b, t] == softmax(cap(q[b, t] @ K.T * scale) + mask) @ V     K, V: slots starts[b] .. slots[b] + t of sequence b

Every shape and every address that a launch depends on is constant while the cache grows: blocks are found through a table of
addresses on the device, and the numbers of cached tokens are read there. So one CUDA graph serves all lengths.

B sequences, T new tokens (1 to 16), S splits, H query heads, K key/value heads, D channels of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.decode_attention import reference
from hasten.ops.rope import QKNorm, qk_rope

BLOCK = 256
"""Tokens per block of the cache."""
MAX_NEW_TOKENS = 16
LARGEST: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtypes of a quantised cache -> the number that the largest channel of a key or value becomes."""


@dataclass(frozen=True)
class CacheView:
    """One layer's cached keys and values.

    blocks: tensors (2, B, K, BLOCK, D), keys then values; slot s of a sequence is row s % BLOCK of block s // BLOCK. Any stride
    between keys and values (a view of some sequences of a larger cache), else contiguous.
    table: (capacity,) int64, their addresses, on the device; the first len(blocks) entries are valid.
    slots_B: (B,) int32, tokens in the cache before this forward. starts_B: (B,) int32, the first slot that is not padding.
    counts: (B * K,) int32, zeros, in which the programs of one launch count; None = allocated at each call.
    scales: of a quantised cache (blocks in a dtype of `LARGEST`), tensors (2, B, K, BLOCK) fp32, one per block: a key or value is
    blocks[...] * scales[...], so every token and head has its own. Empty = not quantised. scale_table: their addresses.
    """

    blocks: Sequence[torch.Tensor]
    table: torch.Tensor
    slots_B: torch.Tensor
    starts_B: torch.Tensor

    counts: torch.Tensor | None = None
    scales: Sequence[torch.Tensor] = ()
    scale_table: torch.Tensor | None = None


@dataclass(frozen=True)
class NewToken:
    """Projections of one new token per sequence, before q/k norm and RoPE.

    q_B1HD, k_B1KD, v_B1KD: contiguous channels. position, rotation, fp32, qk_norm: as in `ops.rope.qk_rope`.
    """

    q_B1HD: torch.Tensor
    k_B1KD: torch.Tensor
    v_B1KD: torch.Tensor
    position: tuple[torch.Tensor, torch.Tensor] | None = None
    rotation: Literal["half", "interleaved"] = "half"
    fp32: bool = False
    qk_norm: QKNorm | None = None


def write_cache(k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, cache: CacheView, backend: Backend | None = None) -> None:
    """Writes keys and values (B, T, K, D) of new tokens to slots slots_B .. slots_B + T - 1, in the blocks' dtype,
    with their scales."""
    if backend_for(k_BTKD, backend) == "triton":
        from hasten.ops.decode_attention.kernels import write

        return write.write_cache(k_BTKD, v_BTKD, cache)
    return reference.write_cache(k_BTKD, v_BTKD, cache, LARGEST)


def decode_attention(
    q_BTHD: torch.Tensor,
    cache: CacheView,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Attends over the cache, into which the new tokens' own keys and values were written before.

    q_BTHD: (B, T, H, D) with T <= MAX_NEW_TOKENS, after RoPE. scale, window, softcap: as in `ops.attention`. Returns (B, T, H, D) in q's dtype, contiguous; 0 for a query
    without a visible key (padding). No gradients.
    """
    if backend_for(q_BTHD, backend) == "triton":
        from hasten.ops.decode_attention.kernels import attend

        return attend.decode_attention(q_BTHD, cache, scale, window, softcap)
    return reference.decode_attention(q_BTHD, cache, scale, window, softcap)


def attend_new_token(
    token: NewToken,
    cache: CacheView,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Norms and rotates queries and keys, writes key and value to slot slots_B, and attends: `qk_rope`, `write_cache` and
    `decode_attention` in one launch.

    Returns (B, 1, H, D) in q's dtype, contiguous. No gradients. Where padding goes beyond the new token (starts_B > slots_B), the
    result is 0.
    """
    if backend_for(token.q_B1HD, backend) == "triton":
        from hasten.ops.decode_attention.kernels import new_token

        return new_token.attend_new_token(token, cache, scale, window, softcap)
    q, k = qk_rope(token.q_B1HD, token.k_B1KD, token.position, token.rotation, token.fp32, token.qk_norm, "reference")
    reference.write_cache(k, token.v_B1KD, cache, LARGEST)
    return reference.decode_attention(q, cache, scale, window, softcap)
