"""Exact softmax attention with grouped queries, softcap, sliding window, packed documents and padding.

attend(q, k, v, mask) == softmax(cap(q @ k.T * scale) + mask) @ v        cap(s) = softcap * tanh(s / softcap)
attention(q, k, v)    == the same with a causal mask, a sliding window and document spans; no dense mask is built

B batch, T queries (tokens), S keys, H query heads, K key/value heads, D channels of a head; H is a multiple of K.
"""

from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from hasten.ops.attention import reference
from hasten.ops.attention.spans import document_starts, row_spans, visible_keys
from hasten.ops.backend import ATTENTION, backend_for

__all__ = [
    "LARGEST_HEAD",
    "CUDNN_LENGTH_MULTIPLE",
    "attend",
    "attention",
    "attention_backend",
    "document_starts",
    "row_spans",
    "visible_keys",
]

AttentionBackend = Literal["reference", "triton", "sdpa"]

LARGEST_HEAD = 256
"""Most channels of a head that fit into a tile of the Triton kernels."""


def attend(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention and materialises its scores (B, H, T, S), for callers that need the attention weights.

    q: (B, H, T, D). k, v: (B, K, S, D). mask: additive, broadcast to (B, H, T, S), or bool (True = visible), or
    None = all visible. dropout: its probability, applied to the weights. The softmax is in fp32.
    Returns (B, T, H, D) contiguous, and the weights (B, H, T, S) in q's dtype. Gradients: q, k, v.
    """
    return reference.attend(q_BHTD, k_BHTD, v_BHTD, mask, scale, softcap, dropout)


CUDNN_LENGTH_MULTIPLE = 64
"""Tokens. In 16 bits torch's attention runs cuDNN, which takes about 60 ms to plan each new sequence length, so it is
used only for lengths that are a multiple of this."""


def attention_backend(
    tokens: int, window: int | None, softcap: float | None, spans: bool, dtype: torch.dtype = torch.bfloat16
) -> AttentionBackend:
    """Selects the fastest exact backend on a GPU.

    "sdpa" (torch's fused attention) for plain causal attention; "triton" for a window, softcap or spans, which sdpa
    takes only as a dense mask, and for 16-bit lengths that cuDNN would have to plan anew (`CUDNN_LENGTH_MULTIPLE`).
    """
    planned = dtype == torch.float32 or tokens % CUDNN_LENGTH_MULTIPLE == 0
    return "sdpa" if _is_plain(tokens, window, softcap, spans) and planned else "triton"


def _is_plain(tokens: int, window: int | None, softcap: float | None, spans: bool) -> bool:
    return softcap is None and not spans and (window is None or window >= tokens)


def attention(  # noqa: PLR0913
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    spans_BT3: torch.Tensor | None = None,
    backend: AttentionBackend | None = None,
) -> torch.Tensor:
    """Computes causal self-attention over whole sequences (as many queries as keys). Only the reference allocates T x
    T.

    q: (B, T, H, D). k, v: (B, T, K, D), in q's dtype. Any strides; channels that are not contiguous are copied.
    window: number of keys that a token attends to, itself included; None = all. spans: (B, T, 3) int32 of `row_spans`,
    for
    packed documents and padding; None = neither. Scores are scaled, then softcapped; the softmax is in fp32. A query
    without a visible key (padding) gets zeros. backend: None = by device and need (`attention_backend`).
    Returns (B, T, H, D) in q's dtype. Gradients: q, k, v; deterministic, without atomic adds.
    Raises ValueError for shapes that do not match, a window below 1, and options that the named backend cannot compute.
    """
    tokens, heads = q_BTHD.shape[1:3]
    if k_BTKD.shape != v_BTKD.shape or k_BTKD.shape[1] != tokens or heads % k_BTKD.shape[2]:
        found = ", ".join(str(tuple(x.shape)) for x in (q_BTHD, k_BTKD, v_BTKD))
        raise ValueError(f"attention needs q (B, T, H, D) and k, v (B, T, K, D) with H a multiple of K; got {found}")
    if window is not None and window < 1:
        raise ValueError(f"the window must be at least 1, as it counts the token itself; got {window}")
    if backend is None and backend_for(q_BTHD, op=ATTENTION) == "triton":
        backend = attention_backend(tokens, window, softcap, spans_BT3 is not None, q_BTHD.dtype)
    if backend == "sdpa":
        if not _is_plain(tokens, window, softcap, spans_BT3 is not None):
            raise ValueError("backend 'sdpa' supports no window, softcap or spans without a dense mask; use 'triton'")
        return _sdpa(q_BTHD, k_BTKD, v_BTKD, scale)
    if backend == "triton":
        from hasten.ops.attention.kernels import forward as kernel

        return kernel.attention(q_BTHD, k_BTKD, v_BTKD, scale, window, softcap, spans_BT3)
    return reference.attention(q_BTHD, k_BTKD, v_BTKD, scale, window, softcap, spans_BT3)


def _sdpa(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    groups = q.shape[1] // k.shape[1]
    if (
        q.dtype == torch.float32 and groups > 1
    ):  # torch's only fp32 kernel without a T x T buffer has no grouped queries
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        groups = 1
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1).transpose(1, 2)
