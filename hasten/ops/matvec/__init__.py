"""W @ x for a dense matrix and one token: memory-bound, so what counts is the bandwidth at which W is read."""

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.matvec import reference


def matvec(weight_OE: torch.Tensor, x_E: torch.Tensor, backend: Backend | None = None) -> torch.Tensor:
    """Returns W @ x (O,) in x's dtype, summed in fp32.

    weight_OE: (O, E) of any floating dtype, contiguous channels. x_E: (E,), contiguous. No gradients.
    """
    if backend_for(x_E, backend) == "triton":
        from hasten.ops.matvec import kernel

        return kernel.matvec(weight_OE, x_E)
    return reference.matvec(weight_OE, x_E)
