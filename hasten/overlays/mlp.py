"""The gated MLP: one op where the projections are frozen weights with plain LoRA on a GPU, else `ops.glu` between them.

Through the second way the projections stay modules, so any adapter and any storage acts as ever.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.ops import glu
from hasten.ops.lora import lora_mlp
from hasten.overlays.base import Overlay
from hasten.overlays.fused_linears import fused_input


@dataclass(frozen=True)
class MLPFacts:
    """activation: transformers' name of the gate's activation."""

    activation: str


class MLPOverlay(Overlay):
    facts: ClassVar[MLPFacts]
    runs = "gated MLP"

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: (..., E). residual: a stream to add the result to, which the last product can do for nothing."""
        fused = fused_input(x, (self.gate_proj, self.up_proj, self.down_proj), self.training)
        if fused is not None:
            x, (gate, up, down) = fused
            return lora_mlp(x, (gate, up, down), self.facts.activation, residual)
        out = self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.facts.activation))
        return out if residual is None else residual + out
