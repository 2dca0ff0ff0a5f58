"""Mistral (arXiv:2310.06825): Llama with an optional sliding window on every layer."""

from hasten.families.schema import Attention, Family, classes

FAMILY = Family(model_type="mistral", classes=classes("mistral", "Mistral"), attention=Attention(window="always"))
