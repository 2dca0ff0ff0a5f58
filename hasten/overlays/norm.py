"""RMSNorm or LayerNorm through `ops.norm`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from hasten.ops import NormInput, norm, norm_and_pass, norm_onto
from hasten.overlays.base import Overlay


@dataclass(frozen=True)
class NormFacts:
    """`spec.Norm` with epsilon read from the config."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    unit_offset: bool = False
    fp32_weight: bool = False


class NormOverlay(Overlay):
    facts: ClassVar[NormFacts]
    runs = "norm"

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        facts = self.facts
        return norm(hidden_states, self.weight, facts.eps, facts.kind, facts.unit_offset, facts.fp32_weight)

    def and_pass(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, NormInput]:
        """(normed, hidden_states, what normed is made from): for a stream that also goes on past the branch that the norm feeds."""
        f = self.facts
        rule = (f.eps, f.kind, f.unit_offset, f.fp32_weight)
        normed, stream = norm_and_pass(hidden_states, self.weight, *rule)
        return normed, stream, NormInput(hidden_states.detach(), self.weight.detach(), *rule)

    def onto(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + normed: for a branch that is normed before it joins the stream."""
        f = self.facts
        return norm_onto(hidden_states, self.weight, residual, f.eps, f.kind, f.unit_offset, f.fp32_weight)
