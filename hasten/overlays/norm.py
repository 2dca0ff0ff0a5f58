"""RMSNorm or LayerNorm through `ops.norm`."""

from typing import ClassVar

import torch

from hasten.ops import NormInput, NormRule, norm, norm_and_pass, norm_onto
from hasten.overlays.base import Overlay


class NormOverlay(Overlay):
    facts: ClassVar[NormRule]
    runs = "norm"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return norm(hidden_states, self.weight, self.facts)

    def and_pass(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, NormInput]:
        """(normed, hidden_states, what normed is made from): for a stream that also goes on past the branch that the norm feeds."""
        normed, stream = norm_and_pass(hidden_states, self.weight, self.facts)
        return normed, stream, NormInput(hidden_states.detach(), self.weight.detach(), self.facts)

    def onto(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + normed: for a branch that is normed before it joins the stream."""
        return norm_onto(hidden_states, self.weight, residual, self.facts)
