"""Implements TRL's fused-head protocol: `model(..., labels=labels, fused_lm_head=True)` returns per-token scores.

TRL's trainers install it by assigning `model.forward = <function made by trl.trainer.utils.add_fused_lm_head>`, whose
closure holds the settings. A head overlay reads them, so that the protocol works with a LoRA on the head, with a
trained copy of it, and through hasten's op; a function that cannot be read is not replaced.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from hasten.errors import InputError
from hasten.ops import ScoreConfig, TokenScores, linear_cross_entropy
from hasten.ops.linear_cross_entropy import OPTIONAL_SCORES
from hasten.overlays.head_inputs import IGNORE_INDEX, head_operands, score_through_module, shifted
from hasten.overlays.label_checks import warn_without_labels
from hasten.overlays.precision import compute_dtype
from hasten.state import FusedHeadRequest, state_of

TRL_MODULE = "trl.trainer.utils"
TRL_FUNCTION = "_fused_forward"


def read_trl_request(forward: Any) -> FusedHeadRequest | None:
    """Reads the settings in TRL's closure; None where `forward` is something else or holds unknown settings."""
    function: Any = getattr(forward, "__func__", None)
    code = getattr(function, "__code__", None)
    if code is None or code.co_name != TRL_FUNCTION or function.__globals__.get("__name__") != TRL_MODULE:
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    if not {"temperature", "cast_lm_head_to_fp32", "outputs"} <= cells.keys():
        return None
    if not set(cells["outputs"]) <= OPTIONAL_SCORES | {"log_probs"}:
        return None
    return FusedHeadRequest(float(cells["temperature"]), bool(cells["cast_lm_head_to_fp32"]), tuple(cells["outputs"]))


@dataclass
class FusedScores(ModelOutput):
    """Per-token scores, each (B, T - 1), or (B, T) with shift_labels; zero where the label is ignored.

    loss: scalar, sum of -log_probs over num_items_in_batch (where None: over the number of labels that are not ignored,
    at least one). log_probs, entropy, log_sum_sq_probs, mean_logits: fp32. is_top1, label_mask: bool. aux_loss: always
    None here.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None

    @classmethod
    def from_tokens(cls, scores: TokenScores, label_mask: torch.Tensor, num_items_in_batch: Any) -> "FusedScores":
        """Scores of B * T tokens as (B, T) fields, all on the head's device."""
        device = scores.log_prob.device
        label_mask = label_mask.to(device)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(device)

        def shaped(score: torch.Tensor | None) -> torch.Tensor | None:
            return None if score is None else score.view(label_mask.shape)

        log_probs = scores.log_prob.view(label_mask.shape)
        count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return cls(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=shaped(scores.entropy),
            log_sum_sq_probs=shaped(scores.log_sum_sq_probs),
            mean_logits=shaped(scores.mean_logits),
            is_top1=None if scores.is_top1 is None else scores.is_top1.view(label_mask.shape).bool(),
            label_mask=label_mask,
        )


def fused_scores(
    model: Any,
    hidden_BTE: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: torch.Tensor | None = None,
) -> FusedScores:
    """Computes the scores that TRL asked for. model: the causal LM, a `HeadOverlay`; its state holds TRL's settings."""
    request = state_of(model).fused_head or FusedHeadRequest()
    hidden, targets = shifted(hidden_BTE, labels, shift_labels, ignore_index)
    config = ScoreConfig(
        model.overlay_config.scale,
        model.overlay_config.softcap,
        request.temperature,
        ignore_index,
        want=frozenset(request.outputs) & OPTIONAL_SCORES,
    )
    if model.training and not state_of(model).saw_labels:
        warn_without_labels(model, targets != ignore_index)
    scores = _score(model, hidden.flatten(0, -2), targets.flatten(), config, request.cast_lm_head_to_fp32)
    return FusedScores.from_tokens(scores, targets != ignore_index, num_items_in_batch)


def _score(model: Any, hidden_NE: torch.Tensor, labels_N: torch.Tensor, config: ScoreConfig, fp32: bool) -> TokenScores:
    """Runs the op on a plain, trained or LoRA head, and the head's own forward where only PEFT can compute it."""
    dtype = torch.float32 if fp32 else compute_dtype(hidden_NE)
    operands = head_operands(model.lm_head, model.training, hidden_NE, dtype)
    if isinstance(operands, str):
        if fp32:
            raise InputError(
                f"cast_lm_head_to_fp32 was asked for and needs a head that is a plain Linear; found: {operands}"
            )
        return score_through_module(model.lm_head, hidden_NE, labels_N, config)
    hidden, weight, bias, lora = operands
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would undo the dtype that was just chosen
        return linear_cross_entropy(hidden, weight, labels_N.to(hidden.device), config, bias, lora)
