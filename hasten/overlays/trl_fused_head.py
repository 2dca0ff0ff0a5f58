"""TRL's fused-head protocol: `model(..., labels=labels, fused_lm_head=True)` answers with per-token scores.

TRL's trainers install it by assigning `model.forward = <function made by trl.trainer.utils.add_fused_lm_head>`. The
settings travel in that function's closure. A head overlay takes them over, so that the head's LoRA, the trained copy
of a head and hasten's own op serve the protocol; a function that it cannot read is left to act as TRL wrote it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from hasten.ops import TokenScores
from hasten.ops.linear_cross_entropy import OPTIONAL_SCORES
from hasten.state import FusedHeadRequest

TRL_MODULE = "trl.trainer.utils"
TRL_FUNCTION = "_fused_forward"


def read_trl_request(forward: Any) -> FusedHeadRequest | None:
    """The settings in TRL's closure, or None where `forward` is something else or holds other settings than known."""
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
    """Per-token scores, each (B, T - 1), or (B, T) for labels that came shifted; zero where the label is ignored.

    loss: scalar, sum of -log_probs over num_items_in_batch (where None: over the labels that count, at least one).
    log_probs, entropy, log_sum_sq_probs, mean_logits: fp32. is_top1, label_mask: bool. aux_loss: always None here.
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
        """All on the head's device, wherever the labels are."""
        device = scores.log_prob.device
        label_mask = label_mask.to(device)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(device)

        def rows(score: torch.Tensor | None) -> torch.Tensor | None:
            return None if score is None else score.view(label_mask.shape)

        log_probs = scores.log_prob.view(label_mask.shape)
        count = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return cls(
            loss=-log_probs.sum() / count,
            log_probs=log_probs,
            entropy=rows(scores.entropy),
            log_sum_sq_probs=rows(scores.log_sum_sq_probs),
            mean_logits=rows(scores.mean_logits),
            is_top1=None if scores.is_top1 is None else scores.is_top1.view(label_mask.shape).bool(),
            label_mask=label_mask,
        )
