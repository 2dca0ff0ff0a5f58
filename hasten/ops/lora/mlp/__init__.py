"""The gated MLP over LoRA linears: all rows at once (kernel), or some at a time (tiled)."""
