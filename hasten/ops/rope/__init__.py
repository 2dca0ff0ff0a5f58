"""Optional norm of queries and keys over each head (q/k norm), then the rotary embedding (Su et al. 2021, arXiv:2104.09864).

rotation "half":        out = x * cos + cat(-x[D/2:], x[:D/2]) * sin        cos = cat(c, c)
rotation "interleaved": out = x * cos + stack(-x[1::2], x[0::2]) * sin      cos = repeat_interleave(c, 2)
"""

from dataclasses import dataclass
from typing import Literal

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.norm import NormConfig
from hasten.ops.rope import reference


@dataclass(frozen=True)
class QKNorm:
    """The q/k norm. q_weight, k_weight: (D,), or (H, D) with one weight per head. config: as in `ops.norm.norm`."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    config: NormConfig


def qk_rope(
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    position: tuple[torch.Tensor, torch.Tensor] | None,
    rotation: Literal["half", "interleaved"] = "half",
    fp32: bool = False,
    qk_norm: QKNorm | None = None,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies the q/k norm (if given) and the rotary embedding to queries and keys, in one pass.

    q_BTHD, k_BTHD: (B, T, H, D); their numbers of heads may differ. position: cos and sin, each (B or 1, T, D), or None = no rotation.
    fp32: rotate in fp32 and cast back; else in the promoted dtype of x and cos. Returns new tensors of the same shapes.
    Gradients: q, k and the norm's weights; none for cos and sin.
    """
    if backend_for(q_BTHD, backend) == "triton":
        from hasten.ops.rope import function

        return function.qk_rope(q_BTHD, k_BTHD, position, rotation, fp32, qk_norm)
    return reference.qk_rope(q_BTHD, k_BTHD, position, rotation, fp32, qk_norm)
