"""The attention context over a `KVCache`: the prompt by `ops.attention`, new tokens by `ops.decode_attention`."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from hasten.inference.decode.cache import CacheRow, KVCache
from hasten.ops.attention import attention
from hasten.ops.decode_attention import MAX_NEW_TOKENS, NewToken, attend_new_token, decode_attention, write_cache
from hasten.ops.lora import HeadsConfig
from hasten.overlays.context import QKV, AttentionContext
from hasten.overlays.precision import compute_dtype


@dataclass(frozen=True, eq=False)
class CachedAttention(AttentionContext):
    """prompt: whether the forward is that of the prompt, over an empty cache. spans_BT3: of a padded prompt, see
    `ops.attention.spans`; None = without padding."""

    cache: KVCache | CacheRow
    prompt: bool
    spans_BT3: torch.Tensor | None = None

    def attend(
        self, module: Any, qkv: QKV, attention_mask: Any, past_key_values: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, None]:
        config = module.overlay_config
        dtype = compute_dtype(qkv[2])
        q, k, v = (x.to(dtype) for x in qkv)
        view = self.cache.view(module.layer_idx)
        write_cache(self.cache.padded(k), self.cache.padded(v), view)
        if self.prompt:
            return attention(q, k, v, config.scale, config.window, config.softcap, self.spans_BT3), None
        parts = [
            decode_attention(
                part, replace(view, slots_B=view.slots_B + index * MAX_NEW_TOKENS) if index else view,
                config.scale, config.window, config.softcap,
            )
            for index, part in enumerate(self.cache.padded(q).split(MAX_NEW_TOKENS, dim=1))
        ]  # fmt: skip
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out[: len(q)], None

    def takes_projections(self, hidden_states: torch.Tensor) -> bool:
        return not self.prompt and hidden_states.shape[:2] == (len(self.cache.slots_B), 1)

    def attend_projections(self, module: Any, qkv: QKV, heads: HeadsConfig) -> torch.Tensor:
        config = module.overlay_config
        dtype = compute_dtype(qkv[2])
        q, k, v = (x.to(dtype) for x in qkv)
        token = NewToken(q, k, v, heads.position, heads.rotation, heads.fp32, heads.qk_norm)
        return attend_new_token(token, self.cache.view(module.layer_idx), config.scale, config.window, config.softcap)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        if self.spans_BT3 is None:
            return self
        return replace(self, spans_BT3=self.spans_BT3.to(device, non_blocking=non_blocking))
