"""Computes the training loss without full logits: the head's matmul and cross-entropy are one op
(`ops.linear_cross_entropy`)."""

from typing import Any

import torch

from hasten.ops import ScoreConfig, linear_cross_entropy_loss
from hasten.overlays.head_inputs import IGNORE_INDEX, head_operands, score_through_module, shifted, targets_of
from hasten.overlays.label_checks import expect_labels
from hasten.overlays.precision import compute_dtype


def fused_loss(
    model: Any,
    hidden_BTE: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the sum of token losses over `num_items_in_batch`, or their mean over the labels that are not ignored.

    model: the causal LM, a `HeadOverlay`. Positions without a label are marked as ignored instead of removed, so that
    the hidden states are not copied. Raises DatasetError if a whole optimizer step has no label.
    """
    if num_items_in_batch is not None:
        expect_labels(model, num_items_in_batch)
    config = ScoreConfig(model.overlay_config.scale, model.overlay_config.softcap, ignore_index=ignore_index)
    operands = head_operands(model.lm_head, model.training, hidden_BTE, compute_dtype(hidden_BTE))
    if isinstance(operands, str):
        hidden, targets = shifted(hidden_BTE, labels, shift_labels, ignore_index)
        total = score_through_module(model.lm_head, hidden.flatten(0, -2), targets.flatten(), config).loss.sum()
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
    hidden, weight, bias, lora = operands
    targets = targets_of(hidden_BTE, labels, shift_labels, ignore_index).to(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would undo the dtype that was just chosen
        return linear_cross_entropy_loss(
            hidden.flatten(0, -2), weight, targets.flatten(), config, num_items_in_batch, bias, lora
        )
