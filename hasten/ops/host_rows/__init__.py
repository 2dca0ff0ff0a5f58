"""Embedding lookup in a table in pinned CPU memory: the GPU kernel reads the rows over PCIe (zero-copy)."""

import torch

from hasten.ops.backend import Backend, backend_for

__all__ = ["host_rows"]


def host_rows(table_VE: torch.Tensor, ids: torch.Tensor, backend: Backend | None = None) -> torch.Tensor:
    """Gathers `table_VE[ids]` onto the device of ids, without a gradient.

    table: (V, E) contiguous, in CPU memory; pinned if ids are on a GPU, which then reads only those rows, in stream
    order and without a host sync. ids: integers of any shape; an id outside of the table gives a row of NaN on a GPU
    and torch's IndexError on a CPU. Returns (*ids.shape, E) in the table's dtype. Raises ValueError for a table that
    the GPU cannot read.
    """
    if backend_for(ids, backend) == "triton":
        if table_VE.is_cuda or not table_VE.is_contiguous() or (ids.is_cuda and not table_VE.is_pinned()):
            raise ValueError(
                f"a GPU reads embeddings only from a contiguous table in pinned CPU memory; got one on {table_VE.device}, "
                f"contiguous={table_VE.is_contiguous()}, pinned={table_VE.is_pinned()}: use table.contiguous().pin_memory()"
            )
        from hasten.ops.host_rows import kernel

        return kernel.host_rows(table_VE.detach(), ids)
    return torch.nn.functional.embedding(ids, table_VE.detach())
