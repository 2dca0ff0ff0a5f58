"""The dtype in which sums are taken."""

import torch


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or as it is where it already has more precision (fp64 in gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()
