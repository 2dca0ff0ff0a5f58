"""Keeps the input embedding in host memory and looks rows up there, so that a GPU only ever gets the rows of a batch."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class _IdsToHost:
    """Forward pre-hook: token ids go where the embedding is."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.to("cpu") if isinstance(a, torch.Tensor) else a for a in args)


class _RowsToDevice:
    """Forward hook: the rows go to the layers' device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, module: nn.Module, args: tuple[Any, ...], rows: torch.Tensor) -> torch.Tensor:
        # Only pinned memory is copied without waiting; the copy that pins is small beside the wait.
        return rows.pin_memory().to(self.device, non_blocking=True)


def keep_embedding_on_host(model: PreTrainedModel) -> str:
    """Moves the (frozen, untied) input embedding to the host. Returns a note. On a CPU it is there already."""
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type == "cpu":
        return "offload_embedding: the embedding is in host memory already, as the whole model is"
    embedding.to("cpu")
    embedding.register_forward_pre_hook(_IdsToHost())
    embedding.register_forward_hook(_RowsToDevice(device))
    size = embedding.weight.numel() * embedding.weight.element_size() / 2**20
    return f"offload_embedding: {size:.0f} MiB of embedding in host memory, looked up there"
