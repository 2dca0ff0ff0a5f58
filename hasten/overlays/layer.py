"""A decoder layer: norms, branches and the residual stream, in the three arrangements that families use."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hasten.overlays.base import Overlay


@dataclass(frozen=True)
class LayerFacts:
    """`spec.Block` with the multiplier's value (1.0 = none)."""

    residual: Literal["serial", "parallel", "sandwich"]
    multiplier: float = 1.0


class LayerOverlay(Overlay):
    facts: ClassVar[LayerFacts]
    runs = "decoder layer"

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: (B, T, E). Keyword arguments go to the attention, as in transformers' layers."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        if self.facts.residual == "parallel":
            return hidden_states + self._branch(attended) + self._branch(self.mlp(normed))
        if self.facts.residual == "sandwich":
            hidden_states = hidden_states + self._branch(self.post_attention_layernorm(attended))
            fed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            return hidden_states + self._branch(self.post_feedforward_layernorm(fed))
        hidden_states = hidden_states + self._branch(attended)
        return hidden_states + self._branch(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _branch(self, branch: torch.Tensor) -> torch.Tensor:
        return branch if self.facts.multiplier == 1.0 else branch * self.facts.multiplier
