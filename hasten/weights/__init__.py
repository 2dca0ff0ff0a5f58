"""Reads a Linear's stored weight (`formats`), the LoRA that PEFT put around it (`peft_layers`), and both as one
operand (`reader`)."""

from hasten.weights.linear import dequantize, holds, label_of, linear_bytes
from hasten.weights.own_forward import hooks_on_every_module, is_watched, needs_own_forward
from hasten.weights.packing import is_packed, pack_weights
from hasten.weights.peft_layers import LoraPair, active_adapters, adapter_type, base_layer_of, read_lora, unwrap
from hasten.weights.pickling import register_pickling
from hasten.weights.reader import head_is_watched, read_head, read_linear

__all__ = [
    "LoraPair",
    "active_adapters",
    "adapter_type",
    "base_layer_of",
    "dequantize",
    "head_is_watched",
    "holds",
    "hooks_on_every_module",
    "is_packed",
    "is_watched",
    "needs_own_forward",
    "label_of",
    "linear_bytes",
    "pack_weights",
    "read_head",
    "read_linear",
    "read_lora",
    "register_pickling",
    "unwrap",
]
