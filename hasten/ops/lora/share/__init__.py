"""LoRA's share of an output laid over what the product will be added to, in one pass."""
