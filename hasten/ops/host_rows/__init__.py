"""Rows of a table that stays in host memory, in the hands of the device that asks for them."""

import torch

from hasten.ops.backend import Backend, backend_for

__all__ = ["host_rows"]


def host_rows(table_VE: torch.Tensor, ids: torch.Tensor, backend: Backend | None = None) -> torch.Tensor:
    """`table_VE[ids]` on the ids' device, without a gradient.

    table: (V, E) contiguous, on the host; pinned where ids are on a GPU, which then reads exactly the wanted rows over the
    bus, in the order of its stream, and nobody waits. ids: any shape of whole numbers; on a GPU one outside of the table
    gives a row of NaN, on a CPU torch's IndexError. Returns (*ids.shape, E) in the table's dtype. Raises ValueError for a
    table that the GPU cannot read.
    """
    if backend_for(ids, backend) == "triton":
        if table_VE.is_cuda or not table_VE.is_contiguous() or (ids.is_cuda and not table_VE.is_pinned()):
            raise ValueError("a GPU reads rows of a contiguous table in pinned host memory; this one is not")
        from hasten.ops.host_rows import kernel

        return kernel.host_rows(table_VE.detach(), ids)
    return torch.nn.functional.embedding(ids, table_VE.detach())
