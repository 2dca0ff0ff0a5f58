"""One attention forward for every family: projections, q/k norm, rotation, cache, and transformers' attention backend."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hasten.ops import NormInput, NormRule, QKNorm, attend
from hasten.ops.lora import Heads
from hasten.overlays.attending import attend_rows, holds_spans
from hasten.overlays.base import Overlay
from hasten.overlays.fused_linears import linear, qkv


@dataclass(frozen=True)
class AttentionFacts:
    """`spec.Attention` of one layer, with the config's values. window: visible keys, the token itself included."""

    scale: float
    rotation: Literal["half", "interleaved"] = "half"
    rope_fp32: bool = False
    use_rope: bool = True
    window: int | None = None
    softcap: float | None = None
    qk_norm: NormRule | None = None


class AttentionOverlay(Overlay):
    facts: ClassVar[AttentionFacts]
    runs = "attention"
    one_product = ("q_proj", "k_proj", "v_proj")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        residual: torch.Tensor | None = None,
        made_from: NormInput | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (B, T, E); cos and sin: (B or 1, T, D). Returns (B, T, E) and the weights, if the backend has them.

        residual: (B, T, E), a stream to add the result to, which the last product can do for nothing.
        made_from: what the norm of hidden_states read, to be kept in place of hidden_states.
        """
        facts = self.facts
        position = position_embeddings if facts.use_rope else None
        heads = Heads(self.head_dim, position, facts.rotation, facts.rope_fp32, self._qk_norm())
        q_BTHD, k_BTHD, v_BTHD = qkv(
            hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.training, heads, made_from
        )
        query, key = q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2)
        value = v_BTHD.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attended, weights = self._attend((query, key, value), attention_mask, kwargs)
        attended = attended.reshape(*hidden_states.shape[:-1], -1)
        return linear(attended, self.o_proj, self.training, residual), weights

    def _attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H, D) and perhaps the weights: by hasten's choice where the backbone left spans, else transformers' way."""
        facts = self.facts
        if holds_spans(attention_mask):
            return attend_rows(qkv, attention_mask, facts.scale, facts.window, facts.softcap), None
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        if facts.softcap is not None:
            kwargs["softcap"] = facts.softcap
        if facts.window is not None:
            kwargs["sliding_window"] = facts.window
        dropout = self.attention_dropout if self.training else 0.0
        return backend(self, *qkv, attention_mask, dropout=dropout, scaling=facts.scale, **kwargs)

    def _qk_norm(self) -> QKNorm | None:
        rule = self.facts.qk_norm
        return None if rule is None else QKNorm(self.q_norm.weight, self.k_norm.weight, rule)


def _eager(  # noqa: PLR0917
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' calling convention over `ops.attend`; the mask already holds causality and window."""
    return attend(query, key, value, attention_mask, scaling, softcap, dropout)
