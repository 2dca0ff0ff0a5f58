"""Tensors as rows, which is how kernels read them, and all at once or some at a time."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., E) as (N, E), channels contiguous; a copy only where they are not or the rows do not fold into one axis."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def in_tiles(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int) -> torch.Tensor:
    """run(x) for a `run` that treats every row (..., E) by itself, `tile` rows (N, E) at a time.

    Where gradients are made, a tile keeps nothing but its rows and is run again in its backward, with the same dropout.
    """
    step = partial(checkpoint, run, use_reentrant=False) if torch.is_grad_enabled() else run
    outs = [step(rows) for rows in x.reshape(-1, x.shape[-1]).split(tile)]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.view(*x.shape[:-1], out.shape[-1])
