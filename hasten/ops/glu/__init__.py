"""Gated activation: glu(gate, up, act) == act(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

import torch

from hasten.ops.backend import Backend, backend_for
from hasten.ops.glu import reference

ACTIVATIONS = reference.ACTIVATIONS


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str, backend: Backend | None = None) -> torch.Tensor:
    """Multiplies act(gate) by up, elementwise.

    gate, up: same shape and dtype. activation: transformers' name for it, one of ACTIVATIONS; any other raises KeyError.
    Returns a new tensor of that shape and dtype. Gradients: gate, up.
    """
    if backend_for(gate, backend) == "triton":
        from hasten.ops.glu import kernel

        return kernel.glu(gate, up, activation)
    return reference.glu(gate, up, activation)
