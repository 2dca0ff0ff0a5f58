"""One attention forward for every family: projections, q/k norm, RoPE, then the forward's attention context."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from transformers.cache_utils import Cache

from hasten.errors import InputError
from hasten.ops import NormConfig, NormInput, QKNorm
from hasten.ops.lora import HeadsConfig
from hasten.overlays.base import Overlay, runs_overlay
from hasten.overlays.cache_name import CACHE
from hasten.overlays.context import STOCK, AttentionContext
from hasten.overlays.fused_linears import linear, projected, qkv, qkv_through_norms
from hasten.overlays.norm import NormOverlay
from hasten.weights import hooks_on_every_module, needs_own_forward


@dataclass(frozen=True)
class AttentionConfig:
    """`families.schema.Attention` of one layer, with the config's values.

    window: number of visible keys, the token's own included. qk_norm_heads_first: transformers calls the norms on q and
    k with heads before tokens.
    """

    scale: float
    rotation: Literal["half", "interleaved"] = "half"
    rope_fp32: bool = False
    use_rope: bool = True
    window: int | None = None
    softcap: float | None = None
    qk_norm: NormConfig | None = None
    qk_norm_heads_first: bool = False


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
        *,
        cache: Cache | None = None,
        residual: torch.Tensor | None = None,
        norm_input: NormInput | None = None,
        attention_context: AttentionContext | None = None,
        rope_is_watched: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (B, T, E) and the attention weights, if the context materialises them.

        hidden_states: (B, T, E). position_embeddings: cos and sin, (B or 1, T, D). residual: (B, T, E), added to the
        result; fused into o_proj (addmm) where the op runs. norm_input: the input of the norm that produced
        hidden_states; the fused op saves it instead of hidden_states and recomputes the norm in the backward.
        attention_context: None = transformers' attention interface. rope_is_watched: cos and sin may be any numbers; the
        kernels rely on the equal halves that transformers' rotary embeddings have. Raises InputError where position_embeddings are
        needed and missing. past_key_values, cache: one argument by its two names, without a wrapper in each layer.
        """
        if cache is not None:
            if CACHE == "cache":
                past_key_values = cache
            else:
                kwargs["cache"] = cache  # of transformers' paged attention
        overlay_config = self.overlay_config
        position = position_embeddings if overlay_config.use_rope else None
        if position is None and overlay_config.use_rope:
            raise InputError(
                "this attention rotates queries and keys and needs position_embeddings (cos, sin), found None"
            )
        heads = HeadsConfig(self.head_dim, position, overlay_config.rotation, overlay_config.rope_fp32)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        context = STOCK if attention_context is None else attention_context
        weights = None
        if not rope_is_watched and context.takes_projections(hidden_states) and self._norms_can_fuse():
            qkv_BTHD = projected(hidden_states, projections, self.training, self.head_dim)
            attended = context.attend_projections(self, qkv_BTHD, replace(heads, qk_norm=self._qk_norm()))
        else:
            if rope_is_watched or not self._norms_can_fuse():
                qkv_BTHD = qkv_through_norms(hidden_states, projections, heads, self._normed)
            else:
                heads = replace(heads, qk_norm=self._qk_norm())
                qkv_BTHD = qkv(hidden_states, projections, self.training, heads, norm_input)
            attended, weights = context.attend(self, qkv_BTHD, attention_mask, past_key_values, kwargs)
        attended = attended.reshape(*hidden_states.shape[:-1], -1)
        return linear(attended, self.o_proj, self.training, residual), weights

    def _qk_norm(self) -> QKNorm | None:
        config = self.overlay_config.qk_norm
        return None if config is None else QKNorm(self.q_norm.weight, self.k_norm.weight, config)

    def _norms_can_fuse(self) -> bool:
        """Returns whether the norms on queries and keys, if there are any, may be computed from their weights, without calling them."""
        if self.overlay_config.qk_norm is None:
            return True
        if hooks_on_every_module():
            return False
        norms = (self.q_norm, self.k_norm)
        return all(runs_overlay(norm, NormOverlay) and not needs_own_forward(norm) for norm in norms)

    def _normed(self, q_BTHD: torch.Tensor, k_BTKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Calls the norms' own forwards, where there are any, with the axes in the order that transformers gives
        them."""
        if self.overlay_config.qk_norm is None:
            return q_BTHD, k_BTKD
        if not self.overlay_config.qk_norm_heads_first:
            return self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        return self.q_norm(q_BTHD.transpose(1, 2)).transpose(1, 2), self.k_norm(k_BTKD.transpose(1, 2)).transpose(1, 2)
