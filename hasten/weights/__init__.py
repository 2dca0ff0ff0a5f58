"""What a Linear really holds, and how to read it: dense, NF4, LLM.int8; and the LoRA that PEFT put around it."""

from hasten.weights.linear import dequantize, holds, storage_of
from hasten.weights.lora import LoraPair, active_adapters, base_layer_of, read_linear, read_lora, unwrap
from hasten.weights.plain import is_watched, lie_apart, pack_weights, plain_linear

__all__ = [
    "LoraPair",
    "active_adapters",
    "base_layer_of",
    "dequantize",
    "holds",
    "is_watched",
    "pack_weights",
    "lie_apart",
    "plain_linear",
    "read_linear",
    "read_lora",
    "storage_of",
    "unwrap",
]
