"""Granite 3: Llama with multipliers on embedding, branches and scores; logits are divided."""

from hasten.families.schema import Attention, Block, Family, Head, classes

FAMILY = Family(
    model_type="granite",
    classes=classes("granite", "Granite"),
    attention=Attention(scale="attention_multiplier"),
    block=Block(multiplier="residual_multiplier"),
    head=Head(divisor="logits_scaling"),
)
