"""q/k norm and rotary embedding in plain torch: the oracle of the kernel and the path on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hasten.ops.norm import norm
from hasten.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from hasten.ops.rope import QKNorm


def qk_rope(
    q_BTHD: torch.Tensor,
    k_BTHD: torch.Tensor,
    position: tuple[torch.Tensor, torch.Tensor] | None,
    rotation: str,
    fp32: bool,
    qk_norm: QKNorm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if qk_norm is not None:
        q_BTHD = norm(q_BTHD, qk_norm.q_weight, qk_norm.config)
        k_BTHD = norm(k_BTHD, qk_norm.k_weight, qk_norm.config)
    if position is None:
        return q_BTHD, k_BTHD
    cos_BT1D, sin_BT1D = (table.unsqueeze(2) for table in position)
    return _rotate(q_BTHD, cos_BT1D, sin_BT1D, rotation, fp32), _rotate(k_BTHD, cos_BT1D, sin_BT1D, rotation, fp32)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: str, fp32: bool) -> torch.Tensor:
    wide = at_least_fp32(x) if fp32 else x
    if rotation == "interleaved":
        partner = torch.stack((-wide[..., 1::2], wide[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    rotated = wide * cos + partner * sin
    return rotated.to(x.dtype) if fp32 else rotated
