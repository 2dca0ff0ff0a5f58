"""Gemma 2 (arXiv:2408.00118): Gemma with four norms a layer, alternating windows and tanh softcaps."""

from hasten.families.schema import MLP, Attention, Block, Family, Head, Norm, classes

FAMILY = Family(
    model_type="gemma2",
    classes=classes("gemma2", "Gemma2"),
    norm=Norm(unit_offset=True, fp32_weight=True),
    attention=Attention(
        window="by_layer", scale="query_pre_attn_scalar", scale_power=-0.5, softcap="attn_logit_softcapping"
    ),
    mlp=MLP(activation="hidden_activation"),
    block=Block(residual="sandwich"),
    head=Head(softcap="final_logit_softcapping"),
    fp16_safe=False,
)
