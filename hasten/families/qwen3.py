"""Qwen3 (arXiv:2505.09388): RMSNorm over each head of q and k before RoPE; head_dim of its own; no bias."""

from hasten.families.schema import Attention, Family, Norm, classes

FAMILY = Family(
    model_type="qwen3",
    classes=classes("qwen3", "Qwen3"),
    attention=Attention(window="by_layer", qk_norm=Norm()),
)
