"""Command R and R+: LayerNorm without bias, one norm for both branches, interleaved RoPE in fp32, scaled logits."""

from dataclasses import replace

from hasten.families.schema import Attention, Block, Family, Head, Norm, classes

NORM = Norm(kind="layer", fp32_weight=True, eps="layer_norm_eps")
FAMILY = Family(
    model_type="cohere",
    classes=replace(classes("cohere", "Cohere"), norm="CohereLayerNorm"),
    norm=NORM,
    attention=Attention(rotation="interleaved", rope_fp32=True, qk_norm=NORM, qk_norm_if="use_qk_norm"),
    block=Block(residual="parallel"),
    head=Head(multiplier="logit_scale"),
)
