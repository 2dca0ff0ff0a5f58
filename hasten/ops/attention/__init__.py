"""Softmax attention with grouped queries, exact, with every fact that families add to it.

attend(q, k, v) == softmax(cap(q @ k.T * scale) + mask) @ v        cap(s) = softcap * tanh(s / softcap)
"""

import torch

from hasten.ops.attention import reference


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
