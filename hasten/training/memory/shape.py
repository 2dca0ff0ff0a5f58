"""What the memory formulas need of a model, read from a config (meta tensors, nothing allocated) or from a live model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hasten.errors import CheckpointError
from hasten.ops.attention import PLANNED
from hasten.ops.backend import backend_for
from hasten.overlays import AttentionFacts, LayerFacts
from hasten.patching.facts import attention_facts, layer_facts
from hasten.patching.plan import causal_lm_of, family_of
from hasten.weights import base_layer_of, lie_apart, plain_linear, unwrap

Quantization = Literal["4bit", "8bit"]

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, one 8-bit scale per 64 weights, one fp32 scale of scales per 256 blocks (arXiv:2305.14314)."""
FP32 = 4


@dataclass(frozen=True)
class LinearShape:
    """One Linear: `rows` outputs, `columns` inputs, and its LoRA's rank (0 = none).

    stored: bytes of weight and bias. dense: whether a product reads the weight where it is stored. adapter: bytes of A
    and B as they are stored. trained: bytes of the gradients of weight and bias, where they train.
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
    """One decoder layer. qkv and gate_up: the Linears that read one input. heads: of queries.

    fused: it runs the way of GPUs (`ops.lora`, `LayerOverlay._fused`). scores: its attention makes all T x T of them.
    norms: bytes of the gradients of the norms' weights.
    """

    qkv: Linears
    o: Linears
    gate_up: Linears
    down: Linears
    heads: int
    facts: LayerFacts
    attention: AttentionFacts
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

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of all that trains in the layer."""
        return self.norms + sum(one.adapter + one.trained for one in self.linears)

    @property
    def mlp_gradients(self) -> int:
        """Those of `gradients` that are there once the MLP's backward has run."""
        return sum(one.adapter + one.trained for one in (*self.gate_up, *self.down))

    def sdpa(self, length: int) -> bool:
        """Whether rows of `length` take torch's fused attention (see `ops.attention.attention_backend`)."""
        window = self.attention.window
        plain = self.attention.softcap is None and (window is None or window >= length)
        return plain and length % PLANNED == 0


@dataclass(frozen=True)
class ModelShape:
    """A causal LM. Bytes are those of one device.

    itemsize: of the compute dtype, which is the stream's. weights: all weights and buffers, trained ones and adapters
    included. embedding, head: bytes of the gradients of the two, 0 where they do not train; where one weight is both
    (tied), head has them. head_itemsize: of the head's weight as it is stored. head_adapter: bytes of a LoRA on it.
    norm: bytes of the last norm's gradient. moment_numbers: weights that train. lookup: bytes of an input embedding that
    could wait in host memory: frozen, untied, on the device.
    """

    layers: tuple[LayerShape, ...]
    vocabulary: int
    itemsize: int
    weights: int
    tied: bool
    embedding: int = 0
    head: int = 0
    head_itemsize: int = 2
    head_adapter: int = 0
    norm: int = 0
    moment_numbers: int = 0
    lookup: int = 0

    @property
    def hidden(self) -> int:
        return self.layers[0].hidden

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of all that trains."""
        outside = self.embedding + self.head + self.head_adapter + self.norm
        return outside + sum(layer.gradients for layer in self.layers)

    @classmethod
    def of_config(  # noqa: PLR0913
        cls,
        config: PreTrainedConfig,
        rank: int = 16,
        quantization: Quantization | None = "4bit",
        full_finetuning: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        offload_embedding: bool = False,
    ) -> "ModelShape":
        """As `FastLanguageModel` would hold the model on a GPU, with a LoRA of `rank` on all seven Linears of each layer,
        or with every weight training. dtype: the compute dtype, and that of weights that are not quantised.

        Raises CheckpointError for an architecture whose layers have no such seven Linears.
        """
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        e = dtype.itemsize
        rank = 0 if full_finetuning else rank

        def read(linear: Any) -> LinearShape:
            rows, columns = linear.out_features, linear.in_features
            numbers = sum(p.numel() for p in linear.parameters())
            adapter = rank * (rows + columns) * FP32
            stored, trained = _stored(linear, quantization, e), numbers * e if full_finetuning else 0
            return LinearShape(rows, columns, stored, rank, quantization is None, adapter, trained)

        layers = _layers(model, read, quantization != "8bit", e if full_finetuning else 0)
        linears = [m for layer in model.get_decoder().layers for m in layer.modules() if isinstance(m, nn.Linear)]
        held = sum(_stored(m, quantization, e) for m in linears)
        in_linears = sum(p.numel() for m in linears for p in m.parameters())
        every = sum(p.numel() for p in model.parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tied = embedding is head
        adapters = sum(one.adapter for layer in layers for one in layer.linears)
        trained = e if full_finetuning else 0
        lookup = 0 if tied or full_finetuning else embedding.numel() * e
        hosted = lookup if offload_embedding else 0
        return cls(
            layers=layers,
            vocabulary=head.shape[0],
            itemsize=e,
            weights=held + (every - in_linears) * e + adapters - hosted,
            tied=tied,
            embedding=0 if tied else embedding.numel() * trained,
            head=head.numel() * trained,
            head_itemsize=e,
            norm=head.shape[1] * trained,
            moment_numbers=every if full_finetuning else adapters // FP32,
            lookup=lookup - hosted,
        )

    @classmethod
    def of_model(cls, model: Any, dtype: torch.dtype | None = None) -> "ModelShape":
        """A live model, with or without an adapter, as it is held and as it trains now. dtype: the compute dtype; None =
        the stream's. Weights elsewhere than on the layers' device (an embedding in host memory) do not count.

        Raises CheckpointError as `of_config`.
        """
        base = causal_lm_of(model)
        embedding: Any = base_layer_of(base.get_input_embeddings())
        head: Any = base_layer_of(base.get_output_embeddings())
        if dtype is None:
            dtype = next(p.dtype for p in base.get_decoder().norm.parameters())
        assert dtype is not None
        probe = next(base.get_decoder().layers.parameters())
        layers = _layers(base, lambda module: _live(module, dtype), backend_for(probe) == "triton", None)
        here = [t for t in (*base.parameters(), *base.buffers()) if t.device == probe.device]
        trained = [p for p in base.parameters() if p.requires_grad]
        lookup, tied = embedding.weight, embedding.weight is head.weight
        last = sum(_gradient(p) for p in base.get_decoder().norm.parameters())
        output = base.get_output_embeddings()
        return cls(
            layers=layers,
            vocabulary=head.weight.shape[0],
            itemsize=dtype.itemsize,
            weights=sum(_bytes(t) for t in here),
            tied=tied,
            embedding=0 if tied else _gradient(embedding.weight),
            head=_gradient(head.weight),
            head_itemsize=head.weight.element_size(),
            head_adapter=sum(_gradient(p) for p in output.parameters() if p is not head.weight),
            norm=last,
            moment_numbers=sum(p.numel() for p in trained),
            lookup=_bytes(lookup) if not (tied or lookup.requires_grad) and lookup.device == probe.device else 0,
        )


def _layers(
    model: Any, read: Callable[[Any], LinearShape], fused: bool, trained_itemsize: int | None
) -> tuple[LayerShape, ...]:
    """Every decoder layer, its Linears through `read`. trained_itemsize: of the norms' gradients, None = as they ask."""
    family, config = family_of(model), model.config
    found = []
    for index, layer in enumerate(model.get_decoder().layers):
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
                f"memory cannot be estimated for {type(layer).__name__}: it has no {', '.join(missing)}"
            )
        modules = [[getattr(owner, name) for name in names] for owner, names in groups]
        shapes = [tuple(map(read, group)) for group in modules]
        if trained_itemsize is None:  # a live model
            shapes = [_as_they_lie(group, found) for group, found in zip(modules, shapes, strict=True)]
            fused_here = fused and family is not None and all(_is_plain(m) for group in modules for m in group)
        else:
            fused_here = fused and family is not None
        seven = {id(p) for group in modules for module in group for p in module.parameters()}
        norms = [p for p in layer.parameters() if id(p) not in seven]
        found.append(
            LayerShape(
                *shapes,
                heads=config.get_text_config().num_attention_heads,
                facts=layer_facts(family, config) if family is not None else LayerFacts("serial"),
                attention=attention_facts(family, config, index) if family is not None else AttentionFacts(1.0),
                fused=fused_here,
                scores=trained_itemsize is None and _makes_scores(model),
                norms=sum(map(_gradient, norms)) if trained_itemsize is None else _count(norms) * trained_itemsize,
            )
        )
    return tuple(found)


def _makes_scores(base: Any) -> bool:
    """Whether transformers' eager attention runs, on a CPU or because somebody named it."""
    config, replaced = base.config, getattr(getattr(base.get_decoder(), "facts", None), "replaces", None)
    on_gpu = backend_for(next(base.parameters())) == "triton"
    return config._attn_implementation == "eager" and not (on_gpu and replaced == "eager")


def _live(module: Any, dtype: torch.dtype) -> LinearShape:
    """A Linear as it is, under whatever PEFT put around it."""
    base: Any = base_layer_of(module)
    adapters = [p for layer in unwrap(module)[1] for p in layer.parameters() if p.requires_grad]
    own = {id(p) for p in base.parameters()}
    adapters = [p for p in adapters if id(p) not in own]
    rank = max((min(p.shape) for p in adapters if p.dim() == 2), default=0)
    dense = base.weight.dtype == dtype
    trained = sum(_gradient(p) for p in base.parameters())
    stored = sum(map(_bytes, base.parameters()))
    return LinearShape(base.out_features, base.in_features, stored, rank, dense, sum(map(_bytes, adapters)), trained)


def _as_they_lie(modules: list[Any], shapes: Linears) -> Linears:
    """`shapes`, none of them dense where one product over all must first copy their weights into one buffer."""
    if len(modules) == 1 or not lie_apart(modules):
        return shapes
    return tuple(replace(one, dense=False) for one in shapes)


def _is_plain(module: Any) -> bool:
    return plain_linear(module, module.training)[0] is not None


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _gradient(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size() if parameter.requires_grad else 0


def _bytes(tensor: Any) -> int:
    """Of a tensor and, where bitsandbytes packed it, of its scales."""
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
    int8 = getattr(tensor, "SCB", None)
    return sum(t.numel() * t.element_size() for t in (tensor, *scales, *([] if int8 is None else [int8])))


def _stored(linear: nn.Linear, quantization: Quantization | None, itemsize: int) -> int:
    """Bytes of a Linear as loading would hold it: NF4, int8 with one fp32 scale a row, or dense."""
    numbers, bias = linear.weight.numel(), 0 if linear.bias is None else linear.bias.numel() * itemsize
    if quantization == "4bit":
        return round(numbers * NF4_BYTES) + bias
    return (numbers + FP32 * linear.out_features if quantization == "8bit" else numbers * itemsize) + bias
