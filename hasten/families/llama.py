"""Llama 1 to 3 (arXiv:2302.13971, 2407.21783): the defaults of the schema; other families record what differs."""

from hasten.families.schema import Family, classes

FAMILY = Family(model_type="llama", classes=classes("llama", "Llama"))
