"""Checks a training step: batches without a label, and trainers that expect nn.DataParallel."""

import logging
from typing import Any

import torch
from torch import nn

from hasten.errors import DatasetError, TrainingError
from hasten.state import state_of

logger = logging.getLogger(__name__)


def refuse_data_parallel(model: nn.Module, num_items_in_batch: Any) -> None:
    """Raises TrainingError under nn.DataParallel, and under a trainer that expects it.

    transformers' Trainer does not wrap quantised models in it, yet takes the batch of all GPUs and multiplies the loss
    by their number.
    """
    several = isinstance(num_items_in_batch, torch.Tensor) and num_items_in_batch.numel() > 1
    if torch.is_grad_enabled() and (several or model.__dict__.get("_is_replica")):
        raise TrainingError(
            "this trainer counts several GPUs for its one process (nn.DataParallel), which would copy the model at "
            "every step, or scale a quantised model's gradients. Start one process per GPU (torchrun --nproc_per_node N, "
            "accelerate launch), make one GPU visible (CUDA_VISIBLE_DEVICES=0), or take the settings from "
            "hasten.sft_config, which train on one"
        )


def expect_labels(model: nn.Module, num_items_in_batch: Any) -> None:
    """Raises DatasetError where a whole optimisation step has no label: the loss would be a silent zero or NaN.

    On a GPU the check synchronises with the device, so it stops once a label was seen.
    """
    on_gpu = isinstance(num_items_in_batch, torch.Tensor) and num_items_in_batch.is_cuda
    if on_gpu and state_of(model).saw_labels:
        return
    if int(num_items_in_batch) == 0:
        raise DatasetError(
            "all labels of this optimizer step are masked, so it has no loss to learn from. Check "
            "the dataset with hasten.check_dataset; an example that is truncated before its answer has no label left"
        )
    state_of(model).saw_labels = True


def warn_without_labels(model: nn.Module, counts: torch.Tensor) -> None:
    """Warns if no batch so far had a label: TRL would continue at a loss of zero. Stops checking at the first label."""
    state = state_of(model)
    state.saw_labels = bool(counts.any())
    if not state.saw_labels:
        logger.warning(
            "All labels of the training batches so far are masked, so the model learns nothing from them. "
            "Check the dataset with hasten.check_dataset."
        )
