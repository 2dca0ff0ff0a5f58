"""Gathers rows of a pinned CPU table from the GPU, through unified addressing (zero-copy): 16 bytes per thread."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hasten.ops.backend import on_device

BLOCK = 1024
"""Channels per program."""


@triton.jit
def _host_rows(table_ptr, ids_ptr, out_ptr, V, E, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < E
    wanted = tl.load(ids_ptr + row).to(tl.int64)
    there = tl.where(wanted < V, tl.where(wanted < 0, 0, E), 0)
    x = tl.load(table_ptr + wanted * E + cols, mask=cols < there, other=float("nan"))
    tl.store(out_ptr + row * E + cols, x, mask=mask)


def host_rows(table_VE: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """See `ops.host_rows`."""
    rows, width = table_VE.shape
    out = torch.empty(*ids.shape, width, dtype=table_VE.dtype, device=ids.device)
    if out.numel():
        with on_device(ids):
            _host_rows[(ids.numel(), triton.cdiv(width, BLOCK))](
                table_VE, ids.contiguous(), out, rows, width, BLOCK=BLOCK
            )
    return out
