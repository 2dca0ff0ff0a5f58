"""The weight format that Linear layers are loaded in: which one is asked for, and what it excludes."""

from collections.abc import Mapping

from hasten.options.fields import LoadFields
from hasten.options.values import not_yet

DEFAULT_ARGUMENT = "load_in_4bit"
"""Asks for the format that is used when no argument asks for one and not all weights train."""
DENSE_ARGUMENT = "load_in_16bit"
OWN_ARGUMENT = "quantization_config"
"""transformers' own argument: the caller chooses the quantiser, and no format of ours is used."""
PLANNED_ARGUMENTS: Mapping[str, str] = {"load_in_fp8": "use load_in_4bit, load_in_8bit or load_in_16bit"}
"""Arguments whose format comes later -> what to use until then."""


def load_arguments() -> dict[str, str]:
    """{argument of `from_pretrained`: name of the weight format that it asks for}."""
    return {"load_in_4bit": "nf4", "load_in_8bit": "int8", "load_in_16bit": "dense"}


def asked_storage(options: LoadFields) -> list[str]:
    """The arguments with which the caller asked for a weight format, or for a quantiser of transformers."""
    known = load_arguments()
    arguments = [*known, *(name for name in PLANNED_ARGUMENTS if name not in known)]
    own = [OWN_ARGUMENT] if options.extra.get(OWN_ARGUMENT) is not None else []
    return [name for name in arguments if _value(options, name)] + own


def weight_format(options: LoadFields) -> str | None:
    """The name of the format that was asked for, the default's included; None = the caller's quantization_config decides.

    Meaningful for options without problems. A checkpoint that is stored quantised keeps its own format.
    """
    asked, formats = asked_storage(options), load_arguments()
    if OWN_ARGUMENT in asked:
        return None
    named = [name for name in asked if name in formats and name != DENSE_ARGUMENT]
    default_on = _value(options, DEFAULT_ARGUMENT) is None and not asked and not options.full_finetuning
    return formats[named[0] if named else DEFAULT_ARGUMENT if default_on else DENSE_ARGUMENT]


def check(options: LoadFields) -> list[str]:
    """At most one format, one that can be trained as asked, and none that comes later."""
    asked = asked_storage(options)
    found = []
    if len(asked) > 1:
        found.append(f"{', '.join(asked)} were asked for together, and weights have one format; keep one of them")
    quantised = [name for name in asked if name != DENSE_ARGUMENT]
    if options.full_finetuning and quantised:
        found.append(
            f"full_finetuning trains all weights, and weights held by {', '.join(quantised)} cannot train; drop one of them"
        )
    planned = [name for name in PLANNED_ARGUMENTS if name not in load_arguments()]
    later = [name for name in planned if _value(options, name) not in (False, None)]
    return found + [not_yet(f"{name}={_value(options, name)!r}", PLANNED_ARGUMENTS[name]) for name in later]


def _value(options: LoadFields, argument: str) -> object:
    """Of a field, or of a keyword argument that a format brings and that is no field."""
    if argument in options.__dataclass_fields__:
        return getattr(options, argument)
    return options.extra.get(argument)
