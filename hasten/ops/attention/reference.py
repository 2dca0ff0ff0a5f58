"""Attention in plain torch: the oracle of the kernels and the path on the CPU. Materialises the scores."""

import torch

from hasten.ops.attention.spans import visible_keys
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


def attention(  # noqa: PLR0917
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    spans_BT3: torch.Tensor | None,
) -> torch.Tensor:
    q, k, v = (at_least_fp32(x) for x in (q_BTHD, k_BTKD, v_BTKD))
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    visible = visible_keys(q.shape[1], window, spans_BT3, q.device)[:, None, None]
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3).to(q_BTHD.dtype)
