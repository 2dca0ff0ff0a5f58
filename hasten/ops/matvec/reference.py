"""A dense matrix times a vector in plain torch."""

import torch


def matvec(weight_OE: torch.Tensor, x_E: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight_OE.float(), x_E.float()).to(x_E.dtype)
