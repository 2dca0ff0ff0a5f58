"""Gated activation: glu(gate, up, act) == act(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

import torch

from hasten.ops.glu import reference

ACTIVATIONS = reference.ACTIVATIONS


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, elementwise.

    gate, up: same shape and dtype. activation: transformers' name, one of ACTIVATIONS; another raises KeyError.
    Returns a new tensor of that shape and dtype. Gradients: gate, up.
    """
    return reference.glu(gate, up, activation)
