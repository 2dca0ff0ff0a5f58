"""Makes the attention context of a forward: packed documents and padding become spans instead of dense masks.

On a GPU, for full sequences (an empty cache), hasten's own attention runs. Everything else (decoding over a cache, 4-D
masks of the caller, an attention backend that the user named) goes through transformers' attention interface. That
ignores packing in two cases, which are handled or refused here.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache, DynamicCache

from hasten.errors import InputError
from hasten.ops.attention import document_starts, row_spans
from hasten.ops.backend import ATTENTION, backend_for
from hasten.overlays.attention import AttentionOverlay
from hasten.overlays.base import Overlay, runs_overlay
from hasten.overlays.cache_name import CACHE
from hasten.overlays.context import AttentionContext, SpanAttention, placeholder_mask
from hasten.weights import hooks_on_every_module, is_watched

MASKED = ("eager", "sdpa", "flex_attention")
"""transformers' backends that separate documents only by the dense mask that transformers builds."""

MIXED_IN_A_GRAPH = (
    "position_ids restart, so the sequences hold several documents, which a compiled or exported model would mix: "
    "compile it without attention_mask and with use_cache=False"
)


@dataclass(frozen=True)
class BackboneConfig:
    """replaces: the `config._attn_implementation` in place of which hasten's own attention runs on a GPU; None = none.
    reason: why None. dropout: on attention weights in training, which hasten's attention does not have."""

    replaces: str | None
    reason: str = ""
    dropout: float = 0.0


class BackboneOverlay(Overlay):
    overlay_config: ClassVar[BackboneConfig]
    runs = "packing and padding"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        *,
        attention_context: AttentionContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes the attention context and runs the stock backbone's forward. attention_context: the caller's own, used
        as it is; None = made here.

        Raises InputError for packed sequences whose documents the attention in use would mix.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        documents = kwargs.get("cu_seq_lens_q")
        chooses = attention_context is None and _is_empty(past_key_values)
        if chooses and given is not None and _is_per_token(given, attention_mask, position_ids):
            if self.uses_own_attention(given, kwargs):
                shape = (given.shape[0], given.shape[1], given.device)
                attention_context = SpanAttention(row_spans(shape, attention_mask, position_ids, documents))
            elif position_ids is not None:
                cache = past_key_values is not None or use_cache is True
                if torch.compiler.is_compiling() and use_cache is None:
                    cache = bool(self.config.use_cache)
                if self._must_isolate(attention_mask, position_ids, cache):
                    # transformers ignores packing if there is a mask (here one without padding) or a cache.
                    attention_mask, use_cache = None, False
            elif documents is not None and self.config._attn_implementation in MASKED:
                raise InputError(
                    "cu_seq_lens_q was given without position_ids: this attention backend would mix the documents of a "
                    "packed sequence. Pass position_ids that restart at each document"
                )
        if attention_context is not None and given is not None:
            attention_mask = placeholder_mask(given)
            kwargs["attention_context"] = attention_context
        if given is not None and backend_for(given) == "triton" and self._rope_is_watched():
            kwargs["rope_is_watched"] = True
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )

    def uses_own_attention(self, inputs: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Returns whether hasten's own attention runs for these inputs, rather than transformers' attention
        interface."""
        overlay_config = self.overlay_config
        if backend_for(inputs, op=ATTENTION) != "triton" or overlay_config.replaces != self.config._attn_implementation:
            return False
        if self.training and overlay_config.dropout:
            return False
        if not self._layers_take_contexts():
            return False
        asked = kwargs.get("output_attentions")
        return not (self.config.output_attentions if asked is None else asked)

    def _rope_is_watched(self) -> bool:
        rotary = self._modules.get("rotary_emb")
        return hooks_on_every_module() or (rotary is not None and is_watched(rotary))

    def _layers_take_contexts(self) -> bool:
        """Returns whether every layer's attention reads the attention context. One with a forward of its own (replaced
        on the instance, or of another class) needs transformers' mask."""
        for layer in self.layers:
            attention = layer._modules.get("self_attn")
            if attention is None or not runs_overlay(attention, AttentionOverlay):
                return False
            own = attention.__dict__
            if "_call_impl" in own or ("forward" in own and "_hf_hook" not in own):
                return False
        return True

    def _must_isolate(self, attention_mask: torch.Tensor | None, position_ids: torch.Tensor, cache: bool) -> bool:
        """Returns whether the sequences are packed, so that transformers' backend needs mask and cache left out.

        Raises InputError where documents would be mixed: with padding in the mask, or with a cache that was asked for.
        """
        name = str(self.config._attn_implementation)
        if name not in MASKED and not name.startswith("flash"):
            return False
        real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
        real = real.to(position_ids.device).bool()
        several = document_starts(position_ids.expand(real.shape), real).any()
        if torch.compiler.is_compiling():
            if attention_mask is not None or cache:
                torch._assert_async(~several, MIXED_IN_A_GRAPH)
            return False  # transformers isolates the documents itself
        if not bool(several):
            return False
        problems = []
        if not bool(real.all()):
            problems.append("an attention_mask with padding was given (leave it out: padding at the end needs none)")
        if cache:
            problems.append("a cache was asked for (pass use_cache=False)")
        if problems:
            raise InputError(
                f"position_ids restart, so the sequences hold several documents, which {name} attention would mix: "
                + " and ".join(problems)
            )
        return True


def _is_empty(past: Cache | None) -> bool:
    """Returns whether there is no cache, or an empty one that returns exactly the keys of its first update."""
    return past is None or (type(past) is DynamicCache and past.get_seq_length() == 0)


def _is_per_token(inputs: torch.Tensor, attention_mask: Any, position_ids: torch.Tensor | None) -> bool:
    """Returns whether mask and positions, where given, hold one entry per token of the inputs (B, T, ...)."""
    fits = attention_mask is None or getattr(attention_mask, "shape", None) == inputs.shape[:2]
    return fits and (position_ids is None or position_ids.shape[1:] == inputs.shape[1:2])
