"""Offloads the input embedding to pinned CPU memory; the GPU reads only the embedding rows of a batch's tokens."""

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
    """An embedding whose weight stays in pinned CPU memory when its model moves; outputs are on the ids' device.

    The weight is frozen: a gradient is refused. A family's own embedding class (which scales the output) still
    runs, since this class is inserted between it and torch's.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Looks up token ids of any shape. Returns (..., E) on their device. Raises InputError for a weight that
        trains."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "offload_embedding keeps a frozen embedding in CPU memory, and this one trains; load the model without "
                "offload_embedding"
            )
        if input.is_cuda and not self.weight.is_pinned():  # a copy, or of another dtype
            self.weight.data = self.weight.data.pin_memory()
        return host_rows(self.weight, input)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Applies `to`, `cuda`, `half`, ...: the weight takes the dtype and stays on the CPU; the rest of the module
        moves."""
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
    """Returns a subclass of `stock` and HostEmbedding, named as `stock`."""
    if stock is nn.Embedding:
        return HostEmbedding
    names = {"__module__": stock.__module__, "__doc__": stock.__doc__, "__reduce_ex__": _reduce}
    return type(stock.__name__, (stock, HostEmbedding), names)  # pyright: ignore[reportGeneralTypeIssues]


def _reduce(self: Any, protocol: Any) -> Any:
    """Implements `__reduce_ex__`: unpickling derives the class from the stock one, since pickle finds only that under
    its name."""
    reduced = super(HostEmbedding, self).__reduce_ex__(protocol)
    return _new, (type(self).__bases__[0],), *reduced[2:]


def _new(stock: type[nn.Module]) -> Any:
    return object.__new__(_on_host(stock))


def keep_embedding_on_host(model: PreTrainedModel) -> str:
    """Moves the (frozen, untied) input embedding to pinned CPU memory. Returns a note. Does nothing on a CPU.

    `model.device` and `next(model.parameters()).device` remain the layers' device.
    """
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    if device.type == "cpu":
        return "offload_embedding: the embedding is in CPU memory already, as the whole model is"
    _stay(model, embedding)
    exclude_from_ddp(model)
    embedding.weight.data = embedding.weight.data.to("cpu").pin_memory()
    size = embedding.weight.numel() * embedding.weight.element_size() / 2**20
    return f"offload_embedding: {size:.0f} MiB of embedding in pinned CPU memory, from which {device} reads"


def exclude_from_ddp(model: nn.Module) -> None:
    """Excludes the offloaded weight from DDP, which refuses weights on several devices; it is frozen, so it has no
    gradient to reduce. model: what DDP will wrap."""
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, HostEmbedding)]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _stay(model: PreTrainedModel, embedding: Any) -> None:
    """Changes the embedding's class, and moves it after its siblings: transformers and other libraries take the device
    of the first parameter as the model's."""
    stock = type(embedding)
    embedding.__class__ = _on_host(stock)
    if "_old_forward" in embedding.__dict__:  # accelerate's hooks call the forward that they stored
        embedding.__dict__["_old_forward"] = type(embedding).forward.__get__(embedding)
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is embedding:
                parent._modules[name] = parent._modules.pop(name)
