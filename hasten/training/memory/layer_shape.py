"""Reads the sizes of one decoder layer for the memory formulas from modules: on the meta device or of a live model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hasten.errors import CheckpointError
from hasten.ops.attention import attention_backend
from hasten.ops.backend import backend_for
from hasten.overlays import AttentionConfig, LayerConfig
from hasten.patching.configs import attention_config, layer_config
from hasten.patching.plan import family_of
from hasten.weights import base_layer_of, is_packed, linear_bytes, read_linear, unwrap
from hasten.weights.formats import WeightFormat, find_format
from hasten.weights.formats.base import tensor_bytes

FP32 = 4


@dataclass(frozen=True)
class LinearShape:
    """One Linear: `rows` output channels, `columns` input channels, and its LoRA's rank (0 = none).

    stored: bytes of weight and bias. dense: a matmul reads the weight where it is stored, without dequantising or
    copying. adapter: bytes of A and B. trained: bytes of the gradients of weight and bias, where they train.
    """

    rows: int
    columns: int
    stored: int
    rank: int = 0
    dense: bool = True
    adapter: int = 0
    trained: int = 0


Linears = tuple[LinearShape, ...]


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. qkv, gate_up: the Linears that read the same input. heads: number of query heads.

    fused: it runs the fused GPU ops (`ops.lora`, `LayerOverlay._fused`). scores: its attention materialises the T x T
    scores. norms: bytes of the gradients of the norms' weights.
    """

    qkv: Linears
    o: Linears
    gate_up: Linears
    down: Linears
    heads: int
    overlay_config: LayerConfig
    attention: AttentionConfig
    fused: bool
    scores: bool = False
    norms: int = 0

    @property
    def hidden(self) -> int:
        return self.qkv[0].columns

    @property
    def queries(self) -> int:
        return self.qkv[0].rows

    @property
    def keys(self) -> int:
        return self.qkv[1].rows

    @property
    def intermediate(self) -> int:
        return self.down[0].columns

    @property
    def linears(self) -> Linears:
        return (*self.qkv, *self.o, *self.gate_up, *self.down)

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of everything that trains in the layer."""
        return self.norms + sum(one.adapter + one.trained for one in self.linears)

    @cached_property
    def mlp_gradients(self) -> int:
        """The part of `gradients` that exists once the MLP's backward has run."""
        return sum(one.adapter + one.trained for one in (*self.gate_up, *self.down))

    def sdpa(self, length: int) -> bool:
        """Returns whether unpacked, unpadded sequences of `length` tokens run torch's fused attention on a GPU."""
        return attention_backend(length, self.attention.window, self.attention.softcap, spans=False) == "sdpa"


def read_layers(
    model: Any, read: Callable[[Any], LinearShape], fused: bool, trained_itemsize: int | None
) -> tuple[LayerShape, ...]:
    """Returns every decoder layer, each Linear through `read`. trained_itemsize: bytes of an element of the norms'
    gradients (0 = they do not train); None = a live model, where `requires_grad` says it."""
    family, config = family_of(model), model.config
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        groups = (
            (attention, ("q_proj", "k_proj", "v_proj")),
            (attention, ("o_proj",)),
            (mlp, ("gate_proj", "up_proj")),
            (mlp, ("down_proj",)),
        )
        missing = [name for owner, names in groups for name in names if not hasattr(owner, name)]
        if missing:
            raise CheckpointError(
                f"memory cannot be estimated for {type(layer).__name__}, which has no {', '.join(missing)}"
            )
        modules = [[getattr(owner, name) for name in names] for owner, names in groups]
        shapes = [tuple(map(read, group)) for group in modules]
        if trained_itemsize is None:  # a live model
            shapes = [_unless_packed(group, found) for group, found in zip(modules, shapes, strict=True)]
            fused_here = fused and family is not None and all(_is_plain(m) for group in modules for m in group)
        else:
            fused_here = fused and family is not None
        seven = {id(p) for group in modules for module in group for p in module.parameters()}
        norms = [p for p in layer.parameters() if id(p) not in seven]
        found.append(
            LayerShape(
                *shapes,
                heads=config.get_text_config().num_attention_heads,
                overlay_config=layer_config(family, config) if family is not None else LayerConfig("serial"),
                attention=attention_config(family, config, index) if family is not None else AttentionConfig(1.0),
                fused=fused_here,
                scores=trained_itemsize is None and _makes_scores(model),
                norms=sum(map(gradient_bytes, norms)) if trained_itemsize is None else _count(norms) * trained_itemsize,
            )
        )
    unique: dict[LayerShape, LayerShape] = {}
    return tuple(unique.setdefault(one, one) for one in found)  # equal layers are one object: see `costs.peak`


def decoder_layers(model: Any) -> Any:
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise CheckpointError(
            f"memory cannot be estimated for {type(model).__name__}, which has no list of decoder layers"
        )
    return layers


def _makes_scores(base: Any) -> bool:
    """Returns whether transformers' eager attention runs: on a CPU, or because the user asked for it."""
    config, replaced = base.config, getattr(getattr(base.get_decoder(), "overlay_config", None), "replaces", None)
    on_gpu = backend_for(next(base.parameters())) == "triton"
    return config._attn_implementation == "eager" and not (on_gpu and replaced == "eager")


def live_linear(module: Any, dtype: torch.dtype) -> LinearShape:
    """Returns a Linear of a live model, under PEFT or not. dtype: the compute dtype."""
    base: Any = base_layer_of(module)
    adapters = [p for layer in unwrap(module)[1] for p in layer.parameters() if p.requires_grad]
    own = {id(p) for p in base.parameters()}
    adapters = [p for p in adapters if id(p) not in own]
    rank = max((min(p.shape) for p in adapters if p.dim() == 2), default=0)
    dense = base.weight.dtype == dtype
    trained = sum(gradient_bytes(p) for p in base.parameters())
    return LinearShape(
        base.out_features, base.in_features, linear_bytes(base), rank, dense, tensor_bytes(*adapters), trained
    )


def _unless_packed(modules: list[Any], shapes: Linears) -> Linears:
    """Returns `shapes`, marked as not dense if one matmul over all must first copy their weights into one tensor."""
    if len(modules) == 1 or is_packed(modules):
        return shapes
    return tuple(replace(one, dense=False) for one in shapes)


def _is_plain(module: Any) -> bool:
    return not isinstance(read_linear(module, module.training), str)


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def gradient_bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size() if parameter.requires_grad else 0


def bytes_when_loaded(linear: nn.Linear, weight_format: WeightFormat, itemsize: int) -> int:
    """Returns the bytes of a Linear once loaded in a format, bias included. itemsize: bytes of the compute dtype."""
    bias = 0 if linear.bias is None else linear.bias.numel() * itemsize
    return weight_format.bytes_for(linear.out_features, linear.in_features, itemsize) + bias


def model_bytes(model: nn.Module, device: torch.device) -> int:
    """Returns the bytes of all weights, scales and buffers of a live model on one device; tied tensors count once."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        new = [t for t in own if id(t) not in seen and t.device == device]
        seen.update(map(id, own))
        found = find_format(module) if isinstance(module, nn.Linear) else None
        if new:
            total += tensor_bytes(*new) if found is None or found.exact else linear_bytes(module)
    return total
