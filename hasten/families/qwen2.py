"""Qwen2 and 2.5 (arXiv:2407.10671): bias on q, k, v (the modules hold it); optional window on the upper layers."""

from hasten.families.schema import Attention, Family, classes

FAMILY = Family(model_type="qwen2", classes=classes("qwen2", "Qwen2"), attention=Attention(window="by_layer"))
