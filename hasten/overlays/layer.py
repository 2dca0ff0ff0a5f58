"""A decoder layer: norms, branches and the residual stream, in the three arrangements that families use."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hasten.ops.backend import backend_for
from hasten.overlays.attention import AttentionOverlay
from hasten.overlays.base import Overlay
from hasten.overlays.mlp import MLPOverlay
from hasten.overlays.norm import NormOverlay
from hasten.overlays.rows import compute_dtype
from hasten.weights import is_watched


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
        if self._branches_add(hidden_states):
            return self._fused(hidden_states, kwargs)
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

    def _branches_add(self, hidden_states: torch.Tensor) -> bool:
        """Whether the branches can add to the stream themselves: nothing between them and it, nobody watching them."""
        if backend_for(hidden_states) != "triton" or self.facts.multiplier != 1.0 or self.facts.residual == "sandwich":
            return False
        if compute_dtype(hidden_states) != hidden_states.dtype:
            return False  # a stream wider than autocast's products must not be rounded by them
        norms = [self.input_layernorm]
        if self.facts.residual == "serial":
            norms.append(self.post_attention_layernorm)
        known = ((self.self_attn, AttentionOverlay), (self.mlp, MLPOverlay), *((norm, NormOverlay) for norm in norms))
        return all(isinstance(module, kind) and not is_watched(module) for module, kind in known)

    def _fused(self, stream: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Serial or parallel, each branch's last product adding to the stream, the stream's gradients meeting in the norms."""
        normed, stream, source = self.input_layernorm.and_pass(stream)
        stream, _ = self.self_attn(hidden_states=normed, residual=stream, made_from=source, **kwargs)
        if self.facts.residual == "serial":
            normed, stream, source = self.post_attention_layernorm.and_pass(stream)
        return self.mlp(normed, residual=stream, made_from=source)

    def _branch(self, branch: torch.Tensor) -> torch.Tensor:
        return branch if self.facts.multiplier == 1.0 else branch * self.facts.multiplier
