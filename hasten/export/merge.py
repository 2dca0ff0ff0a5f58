"""Merges one tensor at a time: W + scale * B @ A in fp32 over the base checkpoint's values, cast once.

The sum runs on the CPU for a model on any device: the result is then bit-identical everywhere and takes no GPU
memory.
"""

from collections.abc import Callable
from typing import Any

import torch

from hasten.errors import ExportError
from hasten.export.slots import Slot
from hasten.weights import active_adapters, adapter_type, dequantize, holds
from hasten.weights.formats import is_quantized

TIED_TO_LIVE_WEIGHT = ("loftq", "pissa", "olora", "corda", "lora_ga")
"""Initialisations that moved a part of the base weight, or of its quantisation error, into the adapter: such an adapter
fits only the model's own weight. A dense weight that they changed is found by comparing it with the base."""


class Merger:
    """Merges tensors. from_live: names of tensors that differ from the base and were therefore taken from the model.

    changed: whether an adapter changed any tensor that was merged so far.
    """

    def __init__(self, initialisations: list[str], dtype: torch.dtype | None, live_dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.live_dtype = live_dtype
        self._needs_live = any(name.startswith(TIED_TO_LIVE_WEIGHT) for name in initialisations)
        self.from_live: set[str] = set()
        self.changed = False

    def merged(self, name: str, slot: Slot, base: torch.Tensor | None) -> torch.Tensor:
        """Returns the tensor to write for `slot`, on the CPU. `base`: the same tensor in the base checkpoint, None
        without one.

        dtype: `self.dtype`, else the base's, else the one the model was loaded in. A tensor that no adapter changes and
        that equals the base's is returned bit-exactly as in the base. Raises ExportError where the result
        overflows its dtype.
        """
        source = self._source(name, slot, base)
        dtype = source.dtype
        if dtype.is_floating_point:
            dtype = self.dtype or (base.dtype if base is not None else self.live_dtype)
        layers = slot.changes
        if not layers:
            return source.to(dtype)
        result = source.to("cpu", torch.float32, copy=True)
        for layer in layers:
            result = _adapt(layer, slot, result, source)
        cast = result.to(dtype)
        if not torch.isfinite(cast).all() and torch.isfinite(source).all():
            raise ExportError(
                f"{name} is not finite after merging in {dtype}: the adapter has NaN or inf, or the sum overflows "
                "(then pass dtype=torch.bfloat16 or torch.float32)"
            )
        self.changed = self.changed or not torch.equal(cast, source.to("cpu", dtype))
        return cast

    def _source(self, name: str, slot: Slot, base: torch.Tensor | None) -> torch.Tensor:
        """Returns the base's values if the model's weight still equals the base's, else the model's own."""
        live = slot.value
        if live.device.type == "meta":
            if base is None:
                raise ExportError(f"{name} is offloaded and its base checkpoint cannot be read; load the model without")
            return base
        quantised = slot.kind == "weight" and is_quantized(slot.module)
        if base is not None and not (quantised and slot.changes and self._needs_live):
            if quantised:
                if holds(slot.module, base):
                    return base
            elif torch.equal(_cast(base, live), live.detach()):
                return base
        if base is not None:
            self.from_live.add(name)
        if quantised:
            return dequantize(slot.module).detach().cpu()
        return _old_rows_from(base, live.detach().cpu())


def _cast(base: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    return base.to(live.device, live.dtype)


def _old_rows_from(base: torch.Tensor | None, live: torch.Tensor) -> torch.Tensor:
    """Returns `live`; if the vocabulary only grew, with the base's values in the old rows."""
    if base is None or base.dim() != live.dim() or base.shape[1:] != live.shape[1:] or len(live) <= len(base):
        return live
    if not torch.equal(_cast(base, live), live[: len(base)]):
        return live
    return torch.cat([base, live[len(base) :].to(base.dtype)])


def _adapt(layer: Any, slot: Slot, result: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Adds every active adapter of `layer` to `result` (fp32, may be changed in place), in the order of PEFT's
    forward."""
    for name in active_adapters(layer):
        if hasattr(layer, "trainable_tokens_delta"):
            if name in layer.trainable_tokens_delta:
                result[layer.token_indices[name]] = _plain(layer.trainable_tokens_delta[name])
        elif slot.kind == "bias" and layer.lora_bias.get(name):
            result += layer.scaling[name] * _plain(layer.lora_B[name].bias)
        elif slot.kind == "weight":
            result = _add_lora(layer, name, result, source)
    return result


def _add_lora(layer: Any, name: str, result: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Computes W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685); DoRA (Liu et al. 2024, arXiv:2402.09353) scales it
    to m, AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) has singular values E and divides by the rank that is left."""
    embedding = name in layer.lora_embedding_A
    if not embedding and name not in layer.lora_A:
        return result
    scale = float(layer.scaling[name])
    if adapter_type(layer) == "ADALORA":
        left, right = _plain(layer.lora_B[name]), _plain(layer.lora_A[name]) * _plain(layer.lora_E[name])
        scale /= float(layer.ranknum[name]) + 1e-5  # as PEFT's forward, against ranks that were pruned to 0
    elif embedding:  # stored as (V, D); PEFT keeps A as (R, V) and B as (D, R)
        left, right = _plain(layer.lora_embedding_A[name]).T, _plain(layer.lora_embedding_B[name]).T
    else:
        left, right = _plain(layer.lora_B[name].weight), _plain(layer.lora_A[name].weight)
    turned_base = getattr(layer, "fan_in_fan_out", False)  # AdaLoRA's quantised layers have no such field
    turn: Callable[[torch.Tensor], torch.Tensor] = torch.t if turned_base and not embedding else lambda w: w
    turned = turn(result)
    turned.addmm_(left, right, alpha=scale)
    if name in layer.lora_variant:
        length_dim = 0 if embedding else 1
        alone = turn(source.to("cpu", torch.float32, copy=True)).addmm_(left, right, alpha=scale)
        length = torch.linalg.vector_norm(alone, dim=length_dim, keepdim=True)
        turned *= _plain(layer.lora_magnitude_vector[name].weight).reshape(length.shape) / length
    return result


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32)
