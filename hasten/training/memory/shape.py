"""Reads the sizes that the memory formulas need from a config or from a live model."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hasten.ops.backend import backend_for
from hasten.state import causal_lm_of
from hasten.training.memory.layer_shape import (
    FP32,
    LayerShape,
    LinearShape,
    bytes_when_loaded,
    decoder_layers,
    gradient_bytes,
    live_linear,
    model_bytes,
    read_layers,
)
from hasten.weights import base_layer_of, formats
from hasten.weights.formats.base import tensor_bytes


@dataclass(frozen=True)
class ModelShape:
    """A causal LM. Bytes are those of one device.

    itemsize: of the compute dtype, which is that of the hidden states. weights: all weights and buffers, trained ones
    and adapters included. embedding, head: bytes of their gradients, 0 where they do not train; where the two are tied,
    head has them. head_itemsize: of the head's stored weight. head_adapter: bytes of a LoRA on it. norm: bytes of the
    last norm's gradient. moment_numbers: number of weights that train. lookup: bytes of an input embedding that could
    be offloaded to CPU memory: frozen, untied, on the device.
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

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of everything that trains."""
        outside = self.embedding + self.head + self.head_adapter + self.norm
        return outside + sum(layer.gradients for layer in self.layers)

    @classmethod
    def of_config(  # noqa: PLR0913
        cls,
        config: PreTrainedConfig,
        rank: int = 16,
        quantization: str | None = None,
        full_finetuning: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        offload_embedding: bool = False,
    ) -> "ModelShape":
        """Returns the shape of the model as `FastLanguageModel` would load it on a GPU, with a LoRA of `rank` on all
        seven Linears of each layer, or with every weight training. quantization: a choice of `weights.formats`, None =
        dense. dtype: the compute dtype, and that of weights that are not quantised.

        Raises CheckpointError for an architecture whose layers do not have these seven Linears.
        """
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        e, stored_in = dtype.itemsize, formats.by_choice(quantization)
        rank = 0 if full_finetuning else rank

        def read(linear: Any) -> LinearShape:
            rows, columns = linear.out_features, linear.in_features
            numbers = sum(p.numel() for p in linear.parameters())
            adapter = rank * (rows + columns) * FP32
            stored, trained = bytes_when_loaded(linear, stored_in, e), numbers * e if full_finetuning else 0
            return LinearShape(rows, columns, stored, rank, stored_in.exact, adapter, trained)

        layers = read_layers(model, read, stored_in.fused, e if full_finetuning else 0)
        linears = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
        held = sum(bytes_when_loaded(m, stored_in, e) for m in linears)
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
        """Returns the shape of a live model, with or without an adapter, as it is stored and trained now. dtype: the
        compute dtype; None = that of the hidden states. Weights on another device than the layers (an offloaded
        embedding) do not count.

        Raises CheckpointError as `of_config`.
        """
        base = causal_lm_of(model)
        embedding: Any = base_layer_of(base.get_input_embeddings())
        head: Any = base_layer_of(base.get_output_embeddings())
        if dtype is None:
            dtype = next(p.dtype for p in base.get_decoder().norm.parameters())
        assert dtype is not None
        probe = next(decoder_layers(base).parameters())
        layers = read_layers(base, lambda module: live_linear(module, dtype), backend_for(probe) == "triton", None)
        trained = [p for p in base.parameters() if p.requires_grad]
        lookup, tied = embedding.weight, embedding.weight is head.weight
        last = sum(gradient_bytes(p) for p in base.get_decoder().norm.parameters())
        output = base.get_output_embeddings()
        return cls(
            layers=layers,
            vocabulary=head.weight.shape[0],
            itemsize=dtype.itemsize,
            weights=model_bytes(base, probe.device),
            tied=tied,
            embedding=0 if tied else gradient_bytes(embedding.weight),
            head=gradient_bytes(head.weight),
            head_itemsize=head.weight.element_size(),
            head_adapter=sum(gradient_bytes(p) for p in output.parameters() if p is not head.weight),
            norm=last,
            moment_numbers=sum(p.numel() for p in trained),
            lookup=tensor_bytes(lookup) if not (tied or lookup.requires_grad) and lookup.device == probe.device else 0,
        )
