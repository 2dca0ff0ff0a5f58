"""Attention contexts: which keys each query sees and which kernel computes it, decided once per forward.

`BackboneOverlay` makes one context per forward and passes it as `attention_context` through the keyword arguments that
transformers' backbones and decoder layers hand on; `AttentionOverlay` calls its `attend`. Without one (None) an
attention runs `StockAttention`. A caller may also pass its own context to the model (a static KV cache, say).

While a context is in use, the backbone gets `placeholder_mask` as its attention mask. transformers passes a 4-D mask
through, so it builds no dense mask, and no attention reads the placeholder.

Shapes: B sequences, T new tokens, S cached and new tokens, H query heads, K key/value heads, D channels of a head.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hasten.ops import attend
from hasten.ops.attention import attention
from hasten.ops.lora import HeadsConfig
from hasten.overlays.cache_name import CACHE
from hasten.overlays.precision import compute_dtype

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class AttentionContext(ABC):
    """Computes attention for every layer of one forward.

    Implementations are frozen dataclasses: FSDP2 (mixed precision) and the memory policy (activations that layers
    share) find the tensors in a dataclass's fields.
    """

    @abstractmethod
    def attend(
        self,
        module: Any,
        qkv: QKV,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Updates the cache, if there is one, and attends.

        module: the attention, an `AttentionOverlay`: its `overlay_config` has scale, window and softcap. qkv: after
        RoPE, q (B, T, H, D), k and v (B, T, K, D). attention_mask, past_key_values, kwargs: what transformers gave the
        attention.
        Returns (B, T, H, D) and the attention weights (B, H, T, S), or None where they are never materialised.
        """

    def takes_projections(self, hidden_states: torch.Tensor) -> bool:
        """Returns whether `attend_projections` runs in place of `attend` for these inputs (B, T, E) of an attention."""
        return False

    def attend_projections(self, module: Any, qkv: QKV, heads: HeadsConfig) -> torch.Tensor:
        """Norms, rotates, updates the cache and attends. qkv: the projections, before q/k norm and RoPE. Returns (B, T, H, D)."""
        raise NotImplementedError

    @abstractmethod
    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """This context on `device`; accelerate's hooks call it where layers are on several devices."""


@dataclass(frozen=True, eq=False)
class StockAttention(AttentionContext):
    """transformers' attention interface (`config._attn_implementation`), with the mask that transformers built."""

    def attend(
        self,
        module: Any,
        qkv: QKV,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        overlay_config = module.overlay_config
        query, key, value = (x.transpose(1, 2) for x in qkv)
        if past_key_values is not None:
            paged = {"kwargs": kwargs} if CACHE == "cache" else {}  # a paged cache writes its block tables there
            key, value = past_key_values.update(key, value, module.layer_idx, **paged)
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, _eager)
        if overlay_config.softcap is not None:
            kwargs["softcap"] = overlay_config.softcap
        if overlay_config.window is not None:
            kwargs["sliding_window"] = overlay_config.window
        dropout = module.attention_dropout if module.training else 0.0
        return backend(
            module, query, key, value, attention_mask, dropout=dropout, scaling=overlay_config.scale, **kwargs
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        return self


STOCK = StockAttention()


@dataclass(frozen=True, eq=False)
class SpanAttention(AttentionContext):
    """`ops.attention`: causal within the spans of packed documents and of padding, without a dense mask.

    spans: (B, T, 3) int32, see `ops.attention.spans`; None = plain causal sequences.
    """

    spans_BT3: torch.Tensor | None

    def attend(
        self,
        module: Any,
        qkv: QKV,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        overlay_config = module.overlay_config
        q, k, v = qkv
        if past_key_values is not None:
            cached = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), module.layer_idx)
            k, v = (x.transpose(1, 2) for x in cached)
        dtype = compute_dtype(v)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(q.device.type, enabled=False):
            out = attention(
                q, k, v, overlay_config.scale, overlay_config.window, overlay_config.softcap, self.spans_BT3
            )
        return out, None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        if self.spans_BT3 is None:
            return self
        moved = self.spans_BT3.to(device, non_blocking=non_blocking)
        return self if moved is self.spans_BT3 else type(self)(moved)


def placeholder_mask(like: torch.Tensor) -> torch.Tensor:
    """Returns (1, 1, 0, 0) bool on the device of `like`: keeps transformers from building a mask. Its shape fits no
    scores, so an attention that reads it raises."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=like.device)


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
    """Wraps `ops.attend` in transformers' calling convention; the mask already includes causality and window."""
    return attend(query, key, value, attention_mask, scaling, softcap, dropout)
