"""The dtype in which sums are taken."""

from typing import Any

import torch


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or as it is where it already has more precision (fp64 in gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()


def add_matmul(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total + left @ right, summed in at least fp32, into `total` where there is one: on a GPU inside of the product."""
    if not left.is_cuda:
        left, right = at_least_fp32(left), at_least_fp32(right)
    wide: dict[str, Any] = {} if left.dtype in (torch.float32, torch.float64) else {"out_dtype": torch.float32}
    if total is None:
        return torch.mm(left, right, **wide)
    return torch.addmm(total, left, right, out=total, **wide)
