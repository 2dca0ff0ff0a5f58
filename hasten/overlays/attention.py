"""One attention forward for every family: projections, q/k norm, RoPE, then the forward's attention context."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers.cache_utils import Cache

from hasten.ops import NormConfig, NormInput, QKNorm
from hasten.ops.lora import HeadsConfig
from hasten.overlays.base import Overlay
from hasten.overlays.context import STOCK, AttentionContext
from hasten.overlays.fused_linears import linear, qkv


@dataclass(frozen=True)
class AttentionConfig:
    """`families.schema.Attention` of one layer, with the config's values. window: number of visible keys, the token's
    own included."""

    scale: float
    rotation: Literal["half", "interleaved"] = "half"
    rope_fp32: bool = False
    use_rope: bool = True
    window: int | None = None
    softcap: float | None = None
    qk_norm: NormConfig | None = None


class AttentionOverlay(Overlay):
    overlay_config: ClassVar[AttentionConfig]
    runs = "attention"
    packed_projections = ("q_proj", "k_proj", "v_proj")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        residual: torch.Tensor | None = None,
        norm_input: NormInput | None = None,
        attention_context: AttentionContext | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (B, T, E) and the attention weights, if the context materialises them.

        hidden_states: (B, T, E). position_embeddings: cos and sin, (B or 1, T, D). residual: (B, T, E), added to the
        result; fused into o_proj (addmm) where the op runs. norm_input: the input of the norm that produced
        hidden_states; the fused op saves it instead of hidden_states and recomputes the norm in the backward.
        attention_context: None = transformers' attention interface.
        """
        overlay_config = self.overlay_config
        position = position_embeddings if overlay_config.use_rope else None
        heads = HeadsConfig(self.head_dim, position, overlay_config.rotation, overlay_config.rope_fp32, self._qk_norm())
        projections = (self.q_proj, self.k_proj, self.v_proj)
        qkv_BTHD = qkv(hidden_states, projections, self.training, heads, norm_input)
        context = STOCK if attention_context is None else attention_context
        attended, weights = context.attend(self, qkv_BTHD, attention_mask, past_key_values, kwargs)
        attended = attended.reshape(*hidden_states.shape[:-1], -1)
        return linear(attended, self.o_proj, self.training, residual), weights

    def _qk_norm(self) -> QKNorm | None:
        config = self.overlay_config.qk_norm
        return None if config is None else QKNorm(self.q_norm.weight, self.k_norm.weight, config)
