"""Who sees whom, settled once per forward of the backbone, in place of the dense masks that transformers would build.

transformers hands a 4-D attention mask to every layer as it is. On a GPU, for whole rows, the backbone's overlay puts the
rows' spans there: (B, 1, T, 3) int32 (see `ops.attention.spans`), or (1, 1, 0, 3) for plain causal rows. The attention
overlay knows them by their dtype. Everything else (decoding over a cache, masks that the caller made, an attention
backend that the user named) goes the way of transformers, whose packing has two gaps that are closed here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from transformers.cache_utils import Cache, DynamicCache

from hasten.errors import InputError
from hasten.ops.attention import attention, document_starts, row_spans
from hasten.ops.backend import backend_for
from hasten.overlays.base import Overlay
from hasten.overlays.head_inputs import compute_dtype

MASKED = ("eager", "sdpa", "flex_attention")
"""transformers' backends that see documents only through the mask that transformers builds."""


@dataclass(frozen=True)
class BackboneConfig:
    """replaces: the `config._attn_implementation` in whose place hasten's own choice runs on a GPU; None = in no place.
    reason: why not, where it is None. dropout: on attention weights in training, which hasten's choice does not do."""

    replaces: str | None
    reason: str = ""
    dropout: float = 0.0


class BackboneOverlay(Overlay):
    overlay_config: ClassVar[BackboneConfig]
    runs = "rows and documents"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock backbone's. Raises InputError for packed rows that the attention in use would mix."""
        given = input_ids if input_ids is not None else inputs_embeds
        documents = kwargs.get("cu_seq_lens_q")
        if given is not None and _is_empty(past_key_values) and _says_of_each(given, attention_mask, position_ids):
            if self.chooses(given, kwargs):
                rows = (given.shape[0], given.shape[1], given.device)
                attention_mask = as_mask(row_spans(rows, attention_mask, position_ids, documents), given)
            elif position_ids is not None:
                cache = past_key_values is not None or use_cache is True
                if self._must_isolate(attention_mask, position_ids, cache):
                    # Beside a mask (here one without padding) or a cache, transformers overlooks packing.
                    attention_mask, use_cache = None, False
            elif documents is not None and self.config._attn_implementation in MASKED:
                raise InputError(
                    "cu_seq_lens_q was given without position_ids: this attention backend would mix the documents of a "
                    "packed row. Pass position_ids that restart at each document"
                )
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def chooses(self, rows: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether hasten's own choice of attention serves these rows, rather than transformers' interface."""
        overlay_config = self.overlay_config
        if backend_for(rows) != "triton" or overlay_config.replaces != self.config._attn_implementation:
            return False
        if self.training and overlay_config.dropout:
            return False
        asked = kwargs.get("output_attentions")
        return not (self.config.output_attentions if asked is None else asked)

    def _must_isolate(self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: bool) -> bool:
        """Whether the rows are packed, for a backend of transformers whose way of keeping documents apart is known.

        Raises InputError where documents would be mixed: with padding in the mask, or with a cache that was asked for.
        """
        name = str(self.config._attn_implementation)
        if name not in MASKED and not name.startswith("flash"):
            return False
        real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
        real = real.to(position_ids.device).bool()
        if not bool(document_starts(position_ids.expand(real.shape), real).any()):
            return False
        problems = []
        if not bool(real.all()):
            problems.append("an attention_mask with padding was given (leave it out: padding at the end needs none)")
        if cache:
            problems.append("a cache was asked for (pass use_cache=False)")
        if problems:
            raise InputError(
                f"position_ids restart, so the rows hold several documents, which {name} attention would mix because "
                + " and ".join(problems)
            )
        return True


def as_mask(spans_BT3: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Spans in the place of an attention mask: (B, 1, T, 3) int32, or (1, 1, 0, 3) for plain causal rows."""
    if spans_BT3 is None:
        return torch.empty(1, 1, 0, 3, dtype=torch.int32, device=rows.device)
    return spans_BT3[:, None]


def holds_spans(attention_mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether what came as an attention mask is `as_mask`'s."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dtype != torch.int32:
        return False
    return attention_mask.dim() == 4 and attention_mask.shape[-1] == 3


def attend_rows(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`ops.attention` over q (B, H, T, D) and k, v (B, H / groups, T, D) with the spans in `mask`. Returns (B, T, H, D)."""
    dtype = compute_dtype(qkv[2])
    q, k, v = (x.transpose(1, 2).to(dtype) for x in qkv)
    with torch.autocast(q.device.type, enabled=False):
        return attention(q, k, v, scale, window, softcap, mask[:, 0] if mask.shape[2] else None)


def _is_empty(past: Cache | None) -> bool:
    """No cache, or one of the kind that hands back exactly the keys it is first given."""
    return past is None or (type(past) is DynamicCache and past.get_seq_length() == 0)


def _says_of_each(rows: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None) -> bool:
    """Whether mask and positions, where given, say one thing of each token of the rows (B, T, ...)."""
    whole_mask = attention_mask is None or getattr(attention_mask, "shape", None) == rows.shape[:2]
    return whole_mask and (position_ids is None or position_ids.shape[1:] == rows.shape[1:2])
