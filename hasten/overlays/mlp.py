"""The gated MLP: one op where the projections are plain weights with at most one plain LoRA on a GPU, else `ops.glu` between them.

Through the second way the projections stay modules, so any adapter and any storage acts as ever.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.ops import NormInput, glu
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
    one_product = ("gate_proj", "up_proj")

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, made_from: NormInput | None = None
    ) -> torch.Tensor:
        """x: (..., E). residual: a stream to add the result to, which the last product can do for nothing. made_from: what x's norm
        read, to be kept in place of x."""
        fused = fused_input(x, (self.gate_proj, self.up_proj, self.down_proj), self.training)
        if fused is not None:
            x, (gate, up, down) = fused
            return lora_mlp(x, (gate, up, down), self.facts.activation, residual, made_from)
        out = self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.facts.activation))
        return out if residual is None else residual + out
