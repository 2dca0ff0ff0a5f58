"""Quantisation-aware training (`qat_scheme`)."""

from hasten.options.fields import AdapterFields, LoadFields
from hasten.options.values import not_yet


def check(options: LoadFields | AdapterFields) -> list[str]:
    """Refuses every scheme: none is supported yet."""
    scheme = options.qat_scheme
    return [] if scheme is None or scheme is False else [not_yet(f"qat_scheme={scheme!r}", "leave it out")]
