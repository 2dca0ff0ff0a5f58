"""The causal-LM forward: backbone, then logits, or a fused loss that never holds the full logits.

Which of the two runs:
- training mode with `labels`: the fused loss; `outputs.logits` raises with the reason and the way to get them;
- `fused_lm_head=True` (TRL's protocol): per-token scores from the same op;
- everything else (no labels, evaluation mode, a loss function of the user's own): real logits, as transformers.
"""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from hasten.errors import DatasetError, InputError, TrainingError
from hasten.ops import LoraHead, ScoreConfig, TokenScores, linear_cross_entropy, linear_cross_entropy_loss
from hasten.ops.linear_cross_entropy import OPTIONAL_SCORES
from hasten.overlays.base import Overlay, with_oom_advice
from hasten.overlays.head_inputs import (
    IGNORED,
    check_length,
    compute_dtype,
    keep_positions,
    score_through_module,
    shifted,
    targets_of,
)
from hasten.overlays.trl_fused_head import FusedScores, read_trl_request
from hasten.state import FusedHeadRequest, state_of
from hasten.weights import read_linear

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadConfig:
    """`spec.Head` with the config's values. scale: multiplies the logits. softcap: after the scale. length: longest row."""

    scale: float = 1.0
    softcap: float | None = None
    max_seq_length: int | None = None


class FusedLossOutput(CausalLMOutputWithPast):
    """A training output whose logits were never computed. Reading them says so instead of giving None."""

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            raise InputError(
                "outputs.logits was read after a fused loss, which never computes them. Call model.eval() first, or call "
                "the model without labels, or with logits_to_keep, to get real logits."
            )
        return super().__getattribute__(name)


class HeadOverlay(Overlay):
    overlay_config: ClassVar[HeadConfig]
    runs = "fused loss"

    def _get_name(self) -> str:
        """The stock name: transformers' Trainer looks it up to decide whether label smoothing shifts the labels."""
        return type(self).__name__

    def __setattr__(self, name: str, value: Any) -> None:
        """TRL's `add_fused_lm_head` assigns `model.forward`; its settings are taken over and the op here serves them."""
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
        """As transformers' `ForCausalLM.forward`. Raises InputError for rows longer than the model was loaded for."""
        rows = input_ids if input_ids is not None else inputs_embeds
        check_length(
            self.overlay_config.max_seq_length, rows, position_ids, past_key_values, kwargs.get("max_length_q")
        )
        fused_lm_head = kwargs.pop("fused_lm_head", False)
        return_dict = kwargs.pop("return_dict", None)
        loss_kwargs = {k: kwargs.pop(k) for k in ("num_items_in_batch", "ignore_index", "shift_labels") if k in kwargs}
        self._refuse_data_parallel(loss_kwargs.get("num_items_in_batch"))
        fused_loss = not fused_lm_head and self._wants_fused_loss(labels, loss_kwargs, logits_to_keep)
        if fused_lm_head or (fused_loss and use_cache is None):
            use_cache = False  # a cache of keys and values that no decoding will ever read
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if fused_lm_head:
            return self._fused_scores(outputs.last_hidden_state, labels, **loss_kwargs)
        if fused_loss:
            loss, logits, kind = (
                self._fused_loss(outputs.last_hidden_state, labels, **loss_kwargs),
                None,
                FusedLossOutput,
            )
        else:
            logits = self._logits(keep_positions(outputs.last_hidden_state, logits_to_keep))
            loss = None
            if labels is not None or loss_kwargs.get("shift_labels") is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs, **kwargs
                )
            kind = CausalLMOutputWithPast
        result = kind(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        wants_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return result if wants_dict else result.to_tuple()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden)
        if self.overlay_config.scale != 1.0:
            logits = logits * self.overlay_config.scale
        if self.overlay_config.softcap is not None:
            logits = torch.tanh(logits / self.overlay_config.softcap) * self.overlay_config.softcap
        return logits

    def _wants_fused_loss(self, labels: torch.Tensor | None, loss_kwargs: dict[str, Any], keep: Any) -> bool:
        has_target = labels is not None or loss_kwargs.get("shift_labels") is not None
        whole_rows = isinstance(keep, int) and keep == 0
        return self.training and has_target and whole_rows and self.loss_function is ForCausalLMLoss

    def _fused_loss(
        self,
        hidden_BTE: torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of token losses over `num_items_in_batch`, or their mean over the labels that count.

        Positions that predict nothing go along as ignored ones, so that the hidden states need not be copied.
        """
        if num_items_in_batch is not None:
            self._expect_labels(num_items_in_batch)
        rule = ScoreConfig(self.overlay_config.scale, self.overlay_config.softcap, ignore_index=ignore_index)
        operands = self._operands(hidden_BTE, compute_dtype(hidden_BTE))
        if isinstance(operands, str):
            hidden, targets = shifted(hidden_BTE, labels, shift_labels, ignore_index)
            total = score_through_module(self.lm_head, hidden.flatten(0, -2), targets.flatten(), rule).loss.sum()
            count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
            return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
        hidden, weight, bias, lora = operands
        targets = targets_of(hidden_BTE, labels, shift_labels, ignore_index).to(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):  # it would undo the dtype that was just chosen
            return linear_cross_entropy_loss(
                hidden.flatten(0, -2), weight, targets.flatten(), rule, num_items_in_batch, bias, lora
            )

    def _refuse_data_parallel(self, num_items_in_batch: Any) -> None:
        """Raises TrainingError under nn.DataParallel, and under a trainer that counts on it: for quantised models, which it does not
        spread, transformers' still takes as many rows as for all GPUs and multiplies the loss by their number."""
        several = isinstance(num_items_in_batch, torch.Tensor) and num_items_in_batch.numel() > 1
        if torch.is_grad_enabled() and (several or self.__dict__.get("_is_replica")):
            raise TrainingError(
                "this trainer counts several GPUs for its one process (nn.DataParallel), which would copy the model at every step, "
                "or scale a quantised one's gradients. Start a process a GPU (torchrun --nproc_per_node N, accelerate launch), make "
                "one GPU visible (CUDA_VISIBLE_DEVICES=0), or take the settings from hasten.sft_config, which train on one"
            )

    def _expect_labels(self, num_items_in_batch: Any) -> None:
        """Raises DatasetError where a whole optimisation step has no label: the loss would be a silent zero or NaN.

        On a GPU looking waits for the device, so there it is done until the first label was seen, and then no more.
        """
        on_gpu = isinstance(num_items_in_batch, torch.Tensor) and num_items_in_batch.is_cuda
        if on_gpu and state_of(self).saw_labels:
            return
        if int(num_items_in_batch) == 0:
            raise DatasetError(
                "not one label in this whole batch counts (all are masked), so there is nothing to learn from it. Check "
                "the dataset with hasten.check_dataset; rows that are cut before their answer lose all labels"
            )
        state_of(self).saw_labels = True

    def _look_for_labels(self, counts: torch.Tensor) -> None:
        """Warns where the batches so far had no label at all; TRL would go on at a loss of zero. Then looks no more."""
        state = state_of(self)
        state.saw_labels = bool(counts.any())
        if not state.saw_labels:
            logger.warning(
                "Not one label of the training batches so far counts (all are masked): nothing is learnt from them. "
                "Check the dataset with hasten.check_dataset."
            )

    def _fused_scores(
        self,
        hidden_BTE: torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
    ) -> FusedScores:
        request = state_of(self).fused_head or FusedHeadRequest()
        hidden, targets = shifted(hidden_BTE, labels, shift_labels, ignore_index)
        rule = ScoreConfig(
            self.overlay_config.scale,
            self.overlay_config.softcap,
            request.temperature,
            ignore_index,
            want=frozenset(request.outputs) & OPTIONAL_SCORES,
        )
        if self.training and not state_of(self).saw_labels:
            self._look_for_labels(targets != ignore_index)
        scores = self._score(hidden.flatten(0, -2), targets.flatten(), rule, fp32=request.cast_lm_head_to_fp32)
        return FusedScores.from_tokens(scores, targets != ignore_index, num_items_in_batch)

    def _score(
        self, hidden_NE: torch.Tensor, labels_N: torch.Tensor, rule: ScoreConfig, fp32: bool = False
    ) -> TokenScores:
        """The op on whatever the head is: plain, trained, with LoRA; or through the module where only PEFT can tell."""
        operands = self._operands(hidden_NE, torch.float32 if fp32 else compute_dtype(hidden_NE))
        if isinstance(operands, str):
            if fp32:
                raise InputError(
                    f"cast_lm_head_to_fp32 needs a head that is a plain Linear; this one is not: {operands}"
                )
            return score_through_module(self.lm_head, hidden_NE, labels_N, rule)
        hidden, weight, bias, lora = operands
        with torch.autocast(hidden.device.type, enabled=False):  # it would undo the dtype that was just chosen
            return linear_cross_entropy(hidden, weight, labels_N.to(hidden.device), rule, bias, lora)

    def _operands(
        self, hidden: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, LoraHead | None] | str:
        """(hidden in `dtype` on the head's device, weight, bias, LoRA), or why only the module itself can tell."""
        base, pair, reason = read_linear(self.lm_head, self.training)
        if base is None or reason is not None:
            return str(reason)
        weight: torch.Tensor = base.weight  # pyright: ignore[reportAssignmentType]
        lora = None if pair is None else LoraHead(pair.a_RE, pair.b_VR, pair.scale)
        return hidden.to(weight.device, dtype), weight, base.bias, lora  # pyright: ignore[reportReturnType]
