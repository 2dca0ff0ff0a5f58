"""What the memory tests share: a count of the bytes that are alive on a CPU, and models on the path that GPUs take."""

import gc
import weakref
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hasten.patching import apply
from hasten.testing import tiny_model
from hasten.training.memory.policy import MemoryPolicy
from hasten.training.memory.policy import policy_of as find_policy

WIDE = {
    "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 512, "num_hidden_layers": 2,
}  # fmt: skip
"""Wide enough that activations outweigh what a tiny model pays besides."""


def policy_of(model: Any) -> MemoryPolicy:
    policy = find_policy(model)
    assert policy is not None
    return policy


class Alive(TorchDispatchMode):
    """Bytes of the storages that ops made and that are alive, and the most of them at once.

    Triton's interpreter leaves cycles behind that hold a kernel's arguments; before a new maximum counts they are collected.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.own = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.sizes = {storage._cdata: 0 for storage in self.own}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        if self.now > self.most:
            gc.collect()
        self.most = max(self.most, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def wide_model(family: str, rank: int | None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model under overlays in training mode; rank None = every weight trains."""
    model: Any = tiny_model(family, dtype=dtype, **{**WIDE, **changes})
    apply(model)
    if rank is None:
        return model.requires_grad_(True).train()
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return adapted.train()


def measured_step(model: Any, length: int) -> int:
    """The most bytes that a forward and a backward hold beyond the model itself."""
    ids = torch.randint(6, 288, (1, length))
    model.zero_grad(set_to_none=True)
    gc.collect()
    gc.freeze()
    try:
        with Alive(model) as alive:
            model(input_ids=ids, labels=ids).loss.backward()
    finally:
        gc.unfreeze()
    return alive.most


def kept_bytes(model: Any, length: int) -> int:
    """What autograd holds between forward and backward, each storage once, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    ids = torch.randint(6, 288, (1, length))
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in own)
