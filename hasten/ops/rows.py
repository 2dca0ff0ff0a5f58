"""Flattens (..., E) tensors to matrices with one row per token, and runs token-wise functions tile by tile."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """Reshapes (..., E) to (N, E) with contiguous channels. A view where strides allow it, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def in_tiles(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int) -> torch.Tensor:
    """Computes run(x) for a token-wise `run`, on `tile` tokens (N, E) at a time.

    With gradients each tile is checkpointed: only its input is saved, and its backward recomputes it with the same
    dropout.
    """
    step = partial(checkpoint, run, use_reentrant=False) if torch.is_grad_enabled() else run
    outs = [step(rows) for rows in x.reshape(-1, x.shape[-1]).split(tile)]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.view(*x.shape[:-1], out.shape[-1])
