"""Lists every tensor of the stock model under PEFT's wrappers, with the adapter layers that change it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hasten.errors import ExportError
from hasten.export.active import MERGEABLE
from hasten.weights import active_adapters, adapter_type, unwrap
from hasten.weights.formats import find_format

MERGEABLE_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")


@dataclass(frozen=True)
class Slot:
    """One tensor: `module` (the stock layer that holds it), its attribute `kind` ("weight", "bias", ...), the adapter
    layers around it, innermost first."""

    module: nn.Module
    kind: str
    layers: tuple[Any, ...] = ()

    @property
    def value(self) -> torch.Tensor:
        return getattr(self.module, self.kind)

    @property
    def elements(self) -> int:
        """Number of values; a quantised weight may pack several into one element."""
        if self.kind == "weight" and isinstance(self.module, nn.Linear):
            return self.module.in_features * self.module.out_features
        return self.value.numel()

    @property
    def changes(self) -> tuple[Any, ...]:
        """The layers that change this tensor: all for a weight; for a bias those with a bias on LoRA's B."""
        if self.kind == "weight":
            return self.layers
        with_bias = [layer for layer in self.layers if hasattr(layer, "lora_bias")]
        return tuple(layer for layer in with_bias if any(layer.lora_bias.get(n) for n in active_adapters(layer)))


def collect(model: nn.Module, found: Iterable[str] = ()) -> dict[str, Slot]:
    """Returns {the stock model's state-dict name: Slot} for the causal LM `model`, under PEFT or not.

    found: problems known already. Raises ExportError, naming all of them, for adapters that cannot be written into a
    weight.
    """
    problems = list(found)
    slots = dict(_walk(model, "", problems))
    if problems:
        raise ExportError("the adapter cannot be merged:\n  " + "\n  ".join(problems))
    return slots


def _walk(module: nn.Module, prefix: str, problems: list[str]) -> Iterator[tuple[str, Slot]]:
    stock, layers = unwrap(module)
    acting = tuple(layer for layer in layers if _is_active(layer))
    for layer in layers:
        problem = _problem(stock, layer)
        if problem is not None:
            problems.append(f"{prefix.removesuffix('.')}: {problem}")
    for name in _tensors_of(stock):
        if getattr(stock, name) is not None:
            yield prefix + name, Slot(stock, name, acting)
    for name, child in stock.named_children():
        yield from _walk(child, f"{prefix}{name}.", problems)


def _tensors_of(stock: nn.Module) -> list[str]:
    """Returns the attributes that a checkpoint of the dense model holds: the scales of a quantised weight are not among
    them."""
    found = find_format(stock) if isinstance(stock, nn.Linear) else None
    if found is not None and not found.exact:
        return ["weight", "bias"]
    persistent = [name for name in stock._buffers if name not in stock._non_persistent_buffers_set]
    return [*stock._parameters, *persistent]


def _is_active(layer: Any) -> bool:
    """Returns whether any active adapter has weights in this layer."""
    held = [getattr(layer, part, {}) for part in ("lora_A", "lora_embedding_A", "trainable_tokens_delta")]
    return any(name in part for name in active_adapters(layer) for part in held)


def _problem(stock: nn.Module, layer: Any) -> str | None:
    if getattr(layer, "merged", False):
        return (
            "PEFT has already merged an adapter into the weight and rounded the sum; call model.unmerge_adapter() first"
        )
    if adapter_type(layer) not in MERGEABLE or not _is_active(layer):
        return None  # `active.unmergeable` has found other methods by walking every module
    if not isinstance(stock, (nn.Linear, nn.Embedding, Conv1D)) or hasattr(layer, "parameter_name"):
        return f"LoRA on {type(stock).__name__} through {type(layer).__name__} cannot be merged"
    for name in active_adapters(layer):
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None and type(variant).__name__ not in MERGEABLE_VARIANTS:
            return f"adapter variant {type(variant).__name__} cannot be merged"
        if getattr(layer, "lora_bias", {}).get(name) and (variant is not None or getattr(stock, "bias", None) is None):
            return "lora_bias=True needs a plain LoRA on a layer that has a bias"
    return None


def same_source(one: Slot, other: Slot) -> bool:
    """Returns whether two slots have the same memory and the same adapter weights: tied before, and tied after a
    merge."""
    return one.value is other.value and [_memory(layer) for layer in one.changes] == [_memory(x) for x in other.changes]


def _memory(layer: Any) -> set[tuple[int, float]]:
    """Returns the addresses of the active adapters' weights. A tied LoRA shares them transposed, so their order does
    not count."""
    if hasattr(layer, "trainable_tokens_delta"):
        return {(delta.data_ptr(), 1.0) for delta in layer.trainable_tokens_delta.values()}
    found = set()
    for name in active_adapters(layer):
        for part in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            if name in part:
                tensor = part[name] if isinstance(part[name], torch.Tensor) else part[name].weight
                found.add((tensor.data_ptr(), float(layer.scaling[name])))
    return found
