"""The gated MLP over LoRA linears as one Function."""
