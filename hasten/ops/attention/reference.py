"""Attention in plain torch."""

import torch

from hasten.ops.precision import at_least_fp32


def attend(  # noqa: PLR0917
    q_BHTD: torch.Tensor,
    k_BHTD: torch.Tensor,
    v_BHTD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = q_BHTD.shape[1] // k_BHTD.shape[1]
    k_BHTD, v_BHTD = k_BHTD.repeat_interleave(groups, dim=1), v_BHTD.repeat_interleave(groups, dim=1)
    scores = q_BHTD @ k_BHTD.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = at_least_fp32(scores).softmax(-1).to(q_BHTD.dtype)
    dropped = torch.nn.functional.dropout(weights, p=dropout) if dropout else weights
    return (dropped @ v_BHTD).transpose(1, 2).contiguous(), weights
