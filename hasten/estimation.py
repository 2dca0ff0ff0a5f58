"""Peak memory of one training step, from a checkpoint's config alone: no weight is read, nothing is allocated.

Symbols: B batch size, T sequence length, L layers, H hidden size, I MLP width, Q and K widths of queries and of keys,
V vocabulary, R rank of the LoRA, e bytes per element of the compute dtype.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hasten.errors import CheckpointError, OptionError
from hasten.ops.linear_cross_entropy import ScoreRule

Quantization = Literal["4bit", "8bit"]

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: four bits, one 8-bit scale per 64 weights, one fp32 scale of scales per 256 blocks (arXiv:2305.14314)."""
ADAM_FP32_BYTES = 16
"""Per trained fp32 weight: the weight, its gradient, two moments (Kingma & Ba 2014, arXiv:1412.6980)."""
LOSS_BUFFERS = 3
"""fp32 buffers of chunk x V that the fused loss holds at once: logits, their gradient, and one temporary."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of one step. `total` is their sum; see `estimate` for what each holds."""

    weights: int
    trained: int
    stored_activations: int
    layer_working_set: int
    loss_chunk: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Label of each part -> bytes, in the order in which they are allocated."""
        return {
            "weights": self.weights,
            "trained weights, gradients, optimizer": self.trained,
            "stored activations": self.stored_activations,
            "one layer's working set": self.layer_working_set,
            "loss chunk": self.loss_chunk,
        }


@dataclass(frozen=True)
class _Shapes:
    """What the formulas need of a model: parameters inside and outside of the layers' Linears, and the widest Linear."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    linear_weights: int
    other_weights: int
    linear_rows: int
    largest_linear: int
    lora_weights_per_rank: int


def estimate(
    config: PreTrainedConfig | str | Path,
    *,
    batch_size: int = 1,
    seq_len: int = 2048,
    rank: int = 16,
    quantization: Quantization | None = "4bit",
    checkpointing: bool = True,
    full_finetuning: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Estimate:
    """Estimates the peak of a step of `FastLanguageModel` with AdamW.

    config: a transformers config, or a folder that holds one. rank: LoRA rank on all seven Linears of every layer.
    dtype: the compute dtype, and that of weights that are not quantised.

    weights: linear_weights * (NF4: 0.516; int8: 1, and 4 per row; dense: e) + all other weights * e
    trained: LoRA: R * (in + out) per Linear * 16 (fp32 weight, gradient, two moments)
             full fine-tuning: every weight * 3 * e (gradient and two moments; the weight itself is counted above)
    stored activations: checkpointing: L * B*T*H * e (each layer's input); without: L layers' working sets
    one layer's working set: B*T * (4H + 2Q + 2K + 4I + 7R) * e, the tensors that one layer saves for its backward,
             + as much again of its widest tensor, in gradients (B*T * 2I * e), + the largest dequantised matrix
    loss chunk: three fp32 buffers of (chunk of `ScoreRule`) x V; the gradient of the last hidden state, B*T*H * e

    Not modelled yet: the CUDA context and library workspaces, fragmentation by the allocator, what eager attention
    stores (T*T per head), dropout masks, `modules_to_save`, offloading, paged or 8-bit optimizers, several GPUs, and
    architectures whose layers differ in shape. No accuracy is promised until it is held against measurements.

    Raises OptionError for numbers that are not positive or quantised full fine-tuning, CheckpointError where there is
    no readable config.
    """
    _check(batch_size, seq_len, rank, quantization, full_finetuning)
    shapes = _shapes(_config(config))
    e = dtype.itemsize
    tokens = batch_size * seq_len
    rank = 0 if full_finetuning else rank
    if quantization == "4bit":
        linear_bytes = shapes.linear_weights * NF4_BYTES
    elif quantization == "8bit":
        linear_bytes = shapes.linear_weights + 4 * shapes.linear_rows
    else:
        linear_bytes = shapes.linear_weights * e
    per_token = 4 * shapes.hidden + 2 * shapes.queries + 2 * shapes.keys + 4 * shapes.intermediate + 7 * rank
    saved_by_layer = tokens * per_token * e
    dequantised = shapes.largest_linear * e if quantization else 0
    every_weight = shapes.linear_weights + shapes.other_weights
    trained = every_weight * 3 * e if full_finetuning else shapes.lora_weights_per_rank * rank * ADAM_FP32_BYTES
    # Without checkpointing the last layer's tensors are stored like all others, so its working set is only the rest.
    stored = shapes.layers * (tokens * shapes.hidden * e if checkpointing else saved_by_layer)
    working = (saved_by_layer if checkpointing else 0) + tokens * 2 * shapes.intermediate * e + dequantised
    loss = min(tokens, ScoreRule.chunk) * shapes.vocabulary * 4 * LOSS_BUFFERS + tokens * shapes.hidden * e
    return Estimate(
        weights=round(linear_bytes + shapes.other_weights * e),
        trained=trained,
        stored_activations=stored,
        layer_working_set=working,
        loss_chunk=loss,
    )


def _check(batch_size: int, seq_len: int, rank: int, quantization: Quantization | None, full: bool) -> None:
    problems = [
        f"{name}={value}: must be at least 1"
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("rank", rank))
        if value < 1
    ]
    if quantization not in (None, "4bit", "8bit"):
        problems.append(f"quantization={quantization!r}: known are '4bit', '8bit' and None")
    if full and quantization is not None:
        problems.append(
            f"full_finetuning trains every weight, which {quantization} storage cannot; use quantization=None"
        )
    if problems:
        raise OptionError("estimate", problems)


def _config(source: PreTrainedConfig | str | Path) -> PreTrainedConfig:
    if isinstance(source, PreTrainedConfig):
        return source
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no config of a known model was found in {source}: {error}") from error


def _shapes(config: PreTrainedConfig) -> _Shapes:
    """Counts on a model of meta tensors, so tied weights, biases and unusual widths come out as they are."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    linear_weights = sum(m.weight.numel() for m in linears)
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return _Shapes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        queries=heads * head_dim,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=text.vocab_size,
        linear_weights=linear_weights,
        other_weights=sum(p.numel() for p in model.parameters()) - linear_weights,
        linear_rows=sum(m.out_features for m in linears),
        largest_linear=max((m.weight.numel() for m in linears), default=0),
        lora_weights_per_rank=sum(m.in_features + m.out_features for m in linears),
    )
