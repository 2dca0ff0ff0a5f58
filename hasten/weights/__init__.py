"""What a Linear really holds, and how to read it: dense, NF4, LLM.int8; and the LoRA that PEFT put around it."""

from hasten.weights.linear import dequantize, storage_of
from hasten.weights.lora import LoraPair, base_layer_of, read_linear, read_lora

__all__ = ["LoraPair", "base_layer_of", "dequantize", "read_linear", "read_lora", "storage_of"]
