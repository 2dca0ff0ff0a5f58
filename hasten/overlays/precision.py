"""Chooses the dtype in which an overlay runs its matmuls."""

import torch


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Returns autocast's dtype if autocast is on for the tensor's device, else the tensor's own."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype
