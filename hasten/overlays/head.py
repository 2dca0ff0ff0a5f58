"""The causal-LM forward: backbone, then logits, or a fused loss that never materialises the full logits.

Which of the two runs:
- training mode with `labels`: the fused loss; reading the logits raises with the reason and the way to get them;
- `fused_lm_head=True` (TRL's protocol): per-token scores from the same op;
- everything else (no labels, evaluation mode, a custom loss function, a head that somebody watches): real logits, as
  in transformers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from hasten.ops.backend import backend_for
from hasten.ops.lora import is_one_token
from hasten.overlays.base import Overlay, with_oom_advice
from hasten.overlays.cache_name import CACHE
from hasten.overlays.fused_linears import linear
from hasten.overlays.fused_loss import fused_loss
from hasten.overlays.fused_output import FusedLossOutput
from hasten.overlays.head_inputs import check_length, keep_positions
from hasten.overlays.label_checks import refuse_data_parallel
from hasten.overlays.trl_fused_head import fused_scores, read_trl_request
from hasten.state import state_of
from hasten.weights import head_is_watched


@dataclass(frozen=True)
class HeadConfig:
    """`families.schema.Head` with the config's values.

    scale: multiplies the logits. softcap: after the scale. max_seq_length: longest sequence in tokens, None = no limit.
    """

    scale: float = 1.0
    softcap: float | None = None
    max_seq_length: int | None = None


class HeadOverlay(Overlay):
    overlay_config: ClassVar[HeadConfig]
    runs = "fused loss"

    def _get_name(self) -> str:
        """Returns the stock name: transformers' Trainer looks it up to decide whether label smoothing shifts the
        labels."""
        return type(self).__name__

    def __setattr__(self, name: str, value: Any) -> None:
        """TRL's `add_fused_lm_head` assigns `model.forward`: its settings go into the state instead."""
        if name == "forward":
            request = read_trl_request(value)
            if request is not None:
                state_of(self).fused_head = request
                return
        super().__setattr__(name, value)

    @with_oom_advice
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Runs backbone and head, with the arguments of transformers' `ForCausalLM.forward`. Raises InputError for
        sequences longer than `max_seq_length`."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        limit = self.overlay_config.max_seq_length
        check_length(limit, inputs, position_ids, past_key_values, kwargs.get("max_length_q"))
        fused_lm_head = kwargs.pop("fused_lm_head", False)
        return_dict = kwargs.pop("return_dict", None)
        loss_kwargs = {k: kwargs.pop(k) for k in ("num_items_in_batch", "ignore_index", "shift_labels") if k in kwargs}
        refuse_data_parallel(self, loss_kwargs.get("num_items_in_batch"))
        trains = not fused_lm_head and self._wants_training_loss(labels, loss_kwargs, logits_to_keep)
        if fused_lm_head or (trains and use_cache is None):
            use_cache = False  # no decoding follows
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **({} if self.config.return_dict else {"return_dict": True}),
            **kwargs,
        )
        hidden_BTE = outputs.last_hidden_state
        if fused_lm_head:
            return fused_scores(self, hidden_BTE, labels, **loss_kwargs)
        found: dict[str, Any] = {
            CACHE: getattr(outputs, CACHE),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if trains and not self._traces_reference() and not head_is_watched(self.lm_head):
            result = FusedLossOutput(loss=fused_loss(self, hidden_BTE, labels, **loss_kwargs), **found)
        else:
            logits = self._logits(keep_positions(hidden_BTE, logits_to_keep))
            loss = None
            if labels is not None or loss_kwargs.get("shift_labels") is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs, **kwargs
                )
            result = CausalLMOutputWithPast(loss=loss, logits=logits, **found)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return result if wants_dict else result.to_tuple()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        one_token = backend_for(hidden) == "triton" and is_one_token(hidden)
        logits = linear(hidden, self.lm_head, self.training) if one_token else self.lm_head(hidden)
        if self.overlay_config.scale != 1.0:
            logits = logits * self.overlay_config.scale
        if self.overlay_config.softcap is not None:
            logits = torch.tanh(logits / self.overlay_config.softcap) * self.overlay_config.softcap
        return logits

    def _wants_training_loss(self, labels: torch.Tensor | None, loss_kwargs: dict[str, Any], keep: Any) -> bool:
        has_target = labels is not None or loss_kwargs.get("shift_labels") is not None
        every_position = isinstance(keep, int) and keep == 0
        return self.training and has_target and every_position and self.loss_function is ForCausalLMLoss

    def _traces_reference(self) -> bool:
        """Returns whether a graph of plain torch operations is being traced (`torch.compile`, `torch.export`). The loop
        of the fused loss over chunks depends on the labels' values; the compiler fuses real logits and their loss."""
        return torch.compiler.is_compiling() and backend_for(self.lm_head.weight) == "reference"
