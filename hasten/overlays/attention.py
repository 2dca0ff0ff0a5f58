"""One attention forward for every family: projections, q/k norm, rotation, cache, and transformers' attention backend."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hasten.ops import NormConfig, NormInput, QKNorm, attend
from hasten.ops.lora import HeadsConfig
from hasten.overlays.backbone import attend_rows, holds_spans
from hasten.overlays.base import Overlay
from hasten.overlays.fused_linears import linear, qkv


@dataclass(frozen=True)
class AttentionConfig:
    """`spec.Attention` of one layer, with the config's values. window: visible keys, the token itself included."""

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
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (B, T, E); cos and sin: (B or 1, T, D). Returns (B, T, E) and the weights, if the backend has them.

        residual: (B, T, E), a stream to add the result to, which the last product can do for nothing.
        norm_input: what the norm of hidden_states read, to be kept in place of hidden_states.
        """
        overlay_config = self.overlay_config
        position = position_embeddings if overlay_config.use_rope else None
        heads = HeadsConfig(self.head_dim, position, overlay_config.rotation, overlay_config.rope_fp32, self._qk_norm())
        q_BTHD, k_BTHD, v_BTHD = qkv(
            hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.training, heads, norm_input
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
        overlay_config = self.overlay_config
        if holds_spans(attention_mask):
            return attend_rows(
                qkv, attention_mask, overlay_config.scale, overlay_config.window, overlay_config.softcap
            ), None
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        if overlay_config.softcap is not None:
            kwargs["softcap"] = overlay_config.softcap
        if overlay_config.window is not None:
            kwargs["sliding_window"] = overlay_config.window
        dropout = self.attention_dropout if self.training else 0.0
        return backend(self, *qkv, attention_mask, dropout=dropout, scaling=overlay_config.scale, **kwargs)

    def _qk_norm(self) -> QKNorm | None:
        rule = self.overlay_config.qk_norm
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
