"""The gated MLP through `ops.glu`; the projections stay modules, so adapters and quantisation act as ever."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hasten.ops import glu
from hasten.overlays.base import Overlay


@dataclass(frozen=True)
class MLPFacts:
    """activation: transformers' name of the gate's activation."""

    activation: str


class MLPOverlay(Overlay):
    facts: ClassVar[MLPFacts]
    runs = "gated MLP"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.facts.activation))
