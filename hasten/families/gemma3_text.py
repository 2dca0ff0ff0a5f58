"""Gemma 3, text part (arXiv:2503.19786): Gemma 2 with norms on q and k in place of the score softcap."""

from hasten.families.schema import MLP, Attention, Block, Family, Head, Norm, classes

NORM = Norm(unit_offset=True, fp32_weight=True)
FAMILY = Family(
    model_type="gemma3_text",
    classes=classes("gemma3", "Gemma3"),
    norm=NORM,
    attention=Attention(
        window="by_layer",
        qk_norm=NORM,
        qk_norm_heads_first=True,
        scale="query_pre_attn_scalar",
        scale_power=-0.5,
    ),
    mlp=MLP(activation="hidden_activation"),
    block=Block(residual="sandwich"),
    head=Head(softcap="final_logit_softcapping"),
    fp16_safe=False,
)
