"""Command R7B and A: Cohere without q/k norms; three windowed layers to one full, RoPE on the windowed ones only."""

from dataclasses import replace

from hasten.families.schema import Attention, Block, Family, Head, Norm, classes

FAMILY = Family(
    model_type="cohere2",
    classes=replace(classes("cohere2", "Cohere2"), norm="Cohere2LayerNorm"),
    norm=Norm(kind="layer", fp32_weight=True, eps="layer_norm_eps"),
    attention=Attention(rotation="interleaved", rope_fp32=True, rope_layers="sliding", window="by_layer"),
    block=Block(residual="parallel"),
    head=Head(multiplier="logit_scale"),
)
