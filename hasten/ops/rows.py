"""Tensors as rows, which is how kernels read them."""

import torch


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., E) as (N, E), channels contiguous; a copy only where they are not or the rows do not fold into one axis."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
