"""Softmax attention with grouped queries, exact, with every fact that families add to it.

attend(q, k, v, mask) == softmax(cap(q @ k.T * scale) + mask) @ v        cap(s) = softcap * tanh(s / softcap)
attention(q, k, v)    == the same, causal, with a window and the spans of documents in place of a dense mask
"""

from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from hasten.ops.attention import reference
from hasten.ops.attention.spans import document_starts, row_spans, visible_keys
from hasten.ops.backend import backend_for

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
"""Channels of a head that the Triton kernels hold in a tile."""


def attend(
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with materialised scores.

    q: (B, H, T, D). k, v: (B, H / groups, S, D). mask: additive, broadcast to (B, H, T, S), or bool (True = visible), or
    None = all visible. dropout: probability on the weights, 0 = none. The softmax is in fp32.
    Returns (B, T, H, D) contiguous, and the weights (B, H, T, S) in q's dtype. Gradients: q, k, v.
    """
    return reference.attend(q_BHTD, k_BHTD, v_BHTD, mask, scale, softcap, dropout)


CUDNN_LENGTH_MULTIPLE = 64
"""torch's attention in 16 bits is cuDNN's, which spends some 60 ms on a plan for each new length: only multiples go there."""


def attention_backend(
    tokens: int, window: int | None, softcap: float | None, spans: bool, dtype: torch.dtype = torch.bfloat16
) -> AttentionBackend:
    """The fastest exact backend on a GPU: torch's fused attention for plain causal rows, ours for what it cannot mask and for
    lengths that come and go."""
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
    """Causal attention of whole rows (as many queries as keys). Nothing of size T x T is made but by the reference.

    q: (B, T, H, D). k, v: (B, T, H / groups, D), of q's dtype, read where they lie (only their channels must be
    contiguous, else they are copied). window: keys that a token sees, itself included; None = all. spans: int32, see `spans`;
    made by `row_spans`. The softmax is in fp32 with scores scaled by `scale`, then softcapped. A query that sees no key
    (padding) gets zeros. backend: None = by device and need (`attention_backend`). "sdpa" raises ValueError for what it
    cannot do. Returns (B, T, H, D) in q's dtype. Gradients: q, k, v. Deterministic: nothing is added atomically.
    """
    tokens, heads = q_BTHD.shape[1:3]
    if k_BTKD.shape != v_BTKD.shape or k_BTKD.shape[1] != tokens or heads % k_BTKD.shape[2]:
        found = ", ".join(str(tuple(x.shape)) for x in (q_BTHD, k_BTKD, v_BTKD))
        raise ValueError(f"attention needs q (B, T, H, D) and k, v (B, T, H / groups, D) of the same rows; got {found}")
    if window is not None and window < 1:
        raise ValueError(f"a window counts the token itself, so it is 1 or more; got {window}")
    if backend is None and backend_for(q_BTHD) == "triton":
        backend = attention_backend(tokens, window, softcap, spans_BT3 is not None, q_BTHD.dtype)
    if backend == "sdpa":
        if not _is_plain(tokens, window, softcap, spans_BT3 is not None):
            raise ValueError("torch's attention without a dense mask knows no window, softcap or spans; use 'triton'")
        return _sdpa(q_BTHD, k_BTKD, v_BTKD, scale)
    if backend == "triton":
        from hasten.ops.attention.kernels import forward as kernel

        return kernel.attention(q_BTHD, k_BTKD, v_BTKD, scale, window, softcap, spans_BT3)
    return reference.attention(q_BTHD, k_BTKD, v_BTKD, scale, window, softcap, spans_BT3)


def _sdpa(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD))
    groups = q.shape[1] // k.shape[1]
    if q.dtype == torch.float32 and groups > 1:  # torch's only fp32 kernel without a T x T buffer knows no groups
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        groups = 1
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1).transpose(1, 2)
