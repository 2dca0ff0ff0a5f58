"""Runs RMSNorm or LayerNorm through `ops.norm`."""

from typing import ClassVar

import torch

from hasten.ops import NormConfig, NormInput, add_norm, norm, norm_with_residual
from hasten.overlays.base import Overlay


class NormOverlay(Overlay):
    overlay_config: ClassVar[NormConfig]
    runs = "norm"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return norm(hidden_states, self.weight, self.overlay_config)

    def with_residual(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, NormInput]:
        """Returns (normed, hidden_states, the norm's input); the two gradients of hidden_states are summed in the
        norm's backward."""
        normed, residual = norm_with_residual(hidden_states, self.weight, self.overlay_config)
        return normed, residual, NormInput(hidden_states.detach(), self.weight.detach(), self.overlay_config)

    def add_to(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Computes residual + norm(hidden_states) in one pass, for a branch that ends with a norm (sandwich layers)."""
        return add_norm(hidden_states, self.weight, residual, self.overlay_config)
