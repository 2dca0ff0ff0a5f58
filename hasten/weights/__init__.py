"""What a Linear really holds, and how to read it: dense, NF4, LLM.int8; and the LoRA that PEFT put around it."""

from hasten.weights.frozen import frozen_linear, is_watched
from hasten.weights.linear import dequantize, holds, storage_of
from hasten.weights.lora import LoraPair, active_adapters, base_layer_of, read_linear, read_lora, unwrap

__all__ = [
    "LoraPair",
    "active_adapters",
    "base_layer_of",
    "dequantize",
    "frozen_linear",
    "holds",
    "is_watched",
    "read_linear",
    "read_lora",
    "storage_of",
    "unwrap",
]
