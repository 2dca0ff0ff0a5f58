"""Accumulates in at least fp32 for inputs of any dtype."""

from typing import Any

import torch


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Casts x to fp32; fp64 (gradcheck) stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def add_matmul(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Computes total + left @ right, accumulated in at least fp32. Adds in place if `total` is given; on a GPU inside
    the matmul (addmm)."""
    if not left.is_cuda:
        left, right = at_least_fp32(left), at_least_fp32(right)
    wide: dict[str, Any] = {} if left.dtype in (torch.float32, torch.float64) else {"out_dtype": torch.float32}
    if total is None:
        return torch.mm(left, right, **wide)
    return torch.addmm(total, left, right, out=total, **wide)
