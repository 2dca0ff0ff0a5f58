"""Llama 1 to 3 (arXiv:2302.13971, 2407.21783): the reference that the other families are told apart from."""

from hasten.families.schema import Family, classes

FAMILY = Family(model_type="llama", classes=classes("llama", "Llama"))
