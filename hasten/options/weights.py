"""The weight format that Linear layers are loaded in: which one is asked for, and what it excludes."""

from collections.abc import Mapping

from hasten.options.fields import LoadFields
from hasten.options.values import not_yet

OWN_ARGUMENT = "quantization_config"
"""transformers' own argument: the caller chooses the quantiser, and no format of ours is used."""
PLANNED_ARGUMENTS: Mapping[str, str] = {"load_in_fp8": "use load_in_4bit, load_in_8bit or load_in_16bit"}
"""Arguments whose format comes later -> what to use until then."""


def load_arguments(quantized: bool = False) -> dict[str, str]:
    """{argument of `from_pretrained`: name of the weight format that it asks for}; quantized: without dense formats."""
    dense = {} if quantized else {"load_in_16bit": "dense"}
    return {"load_in_4bit": "nf4", "load_in_8bit": "int8", **dense}


def default_argument() -> str:
    """Asks for the format that is used when no argument asks for one and not all weights train."""
    return "load_in_4bit"


def asked_storage(options: LoadFields) -> list[str]:
    """The arguments with which the caller asked for a weight format, or for a quantiser of transformers."""
    known = load_arguments()
    arguments = [*known, *(name for name in PLANNED_ARGUMENTS if name not in known)]
    own = [OWN_ARGUMENT] if options.extra.get(OWN_ARGUMENT) is not None else []
    return [name for name in arguments if _value(options, name)] + own


def weight_format(options: LoadFields) -> str | None:
    """The name of the format that was asked for, or of the default; None where weights stay as the checkpoint stores them
    and where the caller's quantization_config decides.

    Meaningful for options without problems.
    """
    asked, formats = asked_storage(options), load_arguments()
    default_on = not asked and not options.full_finetuning and _value(options, default_argument()) is None
    named = [default_argument()] if default_on else [name for name in asked if name in formats]
    return formats[named[0]] if named else None


def check(options: LoadFields) -> list[str]:
    """At most one format, one that can be trained as asked, and none that comes later."""
    asked = asked_storage(options)
    found = []
    if len(asked) > 1:
        found.append(f"{', '.join(asked)} were asked for together, and weights have one format; keep one of them")
    dense = load_arguments().keys() - load_arguments(quantized=True).keys()
    quantised = [name for name in asked if name not in dense]
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
