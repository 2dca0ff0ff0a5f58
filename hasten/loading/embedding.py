"""Keeps the input embedding in pinned host memory, so that a GPU only ever gets the rows of a batch."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hasten.errors import InputError
from hasten.ops.host_rows import host_rows


class HostEmbedding(nn.Embedding):
    """An embedding whose weight stays in host memory wherever its model goes; its rows come where the ids are.

    The weight is frozen: its gradient is refused. What a family's own class does with the rows (a scale) runs on them
    as ever, since this class stands between that one and torch's.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids of any shape, (..., E) on their device. Raises InputError for a weight that is to train."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "offload_embedding keeps a frozen embedding on the host, and this one is to train; load the model without "
                "offload_embedding"
            )
        if input.is_cuda and not self.weight.is_pinned():  # a copy, or of another dtype
            self.weight.data = self.weight.data.pin_memory()
        return host_rows(self.weight, input)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """`to`, `cuda`, `half`, ...: the weight follows in dtype and stays where it is; all else of the module moves."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        dtype = fn(weight.detach().new_empty(0)).dtype
        if dtype != weight.dtype:
            weight.data = weight.data.to(dtype)
        return self


@functools.cache
def _on_host(stock: type[nn.Module]) -> type[nn.Module]:
    """`stock` over HostEmbedding, under its own name."""
    if stock is nn.Embedding:
        return HostEmbedding
    names = {"__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock, HostEmbedding), names)  # pyright: ignore[reportGeneralTypeIssues]


def keep_embedding_on_host(model: PreTrainedModel) -> str:
    """Moves the (frozen, untied) input embedding to the host. Returns a note. On a CPU it is there already.

    `model.device` and `next(model.parameters()).device` go on telling the layers' device.
    """
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type == "cpu":
        return "offload_embedding: the embedding is in host memory already, as the whole model is"
    _stay(model, embedding)
    leave_out_of_ddp(model)
    embedding.weight.data = embedding.weight.data.to("cpu").pin_memory()
    size = embedding.weight.numel() * embedding.weight.element_size() / 2**20
    return f"offload_embedding: {size:.0f} MiB of embedding in pinned host memory, from which {device} reads rows"


def leave_out_of_ddp(model: nn.Module) -> None:
    """DDP refuses weights on a host beside others on a GPU; a frozen one has no gradient to share. model: what DDP will wrap."""
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, HostEmbedding)]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _stay(model: PreTrainedModel, embedding: Any) -> None:
    """Gives the embedding its class, and a place behind its siblings.

    transformers, and code that asks the first parameter, take its device for the model's.
    """
    stock = type(embedding)
    embedding.__class__ = _on_host(stock)
    if "_old_forward" in embedding.__dict__:  # accelerate's hooks call the forward that they found
        embedding.__dict__["_old_forward"] = type(embedding).forward.__get__(embedding)
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is embedding:
                parent._modules[name] = parent._modules.pop(name)
