"""Gemma 1 (arXiv:2403.08295): norms scale by (1 + w) in fp32, GEGLU, scaled embeddings, tied head."""

from hasten.families.schema import Family, Norm, classes

FAMILY = Family(
    model_type="gemma",
    classes=classes("gemma", "Gemma"),
    norm=Norm(unit_offset=True, fp32_weight=True),
    fp16_safe=False,
)
