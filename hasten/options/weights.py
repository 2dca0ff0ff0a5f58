"""Checks the weight format that Linear layers are loaded in, and what it excludes."""

from collections.abc import Mapping

from hasten.options.fields import LoadFields
from hasten.options.values import not_yet
from hasten.weights import formats

OWN_ARGUMENT = "quantization_config"
"""transformers' own argument: the caller chooses the quantiser, and none of hasten's formats is used."""
PLANNED_ARGUMENTS: Mapping[str, str] = {"load_in_fp8": "use load_in_4bit, load_in_8bit or load_in_16bit"}
"""Arguments whose format is planned for later -> what to use until then."""


def asked_storage(options: LoadFields) -> list[str]:
    """Returns the arguments with which the caller asked for a weight format, or for a quantiser of transformers."""
    known = formats.load_arguments()
    arguments = [*known, *(name for name in PLANNED_ARGUMENTS if name not in known)]
    own = [OWN_ARGUMENT] if options.extra.get(OWN_ARGUMENT) is not None else []
    return [name for name in arguments if _value(options, name)] + own


def weight_format(options: LoadFields) -> str | None:
    """Returns the name of the format that was asked for, or of the default; None where weights stay as the checkpoint
    stores them and where the caller's quantization_config decides.

    Meaningful for options without problems.
    """
    asked, names, default = asked_storage(options), formats.load_arguments(), str(formats.default().load_argument)
    default_on = not asked and not options.full_finetuning and _value(options, default) is None
    named = [default] if default_on else [name for name in asked if name in names]
    return names[named[0]] if named else None


def check(options: LoadFields) -> list[str]:
    """Checks that at most one format was requested, that it can be trained as requested, and that it is supported
    yet."""
    asked = asked_storage(options)
    found = []
    if len(asked) > 1:
        found.append(f"{', '.join(asked)} were asked for together, and weights have one format; keep one of them")
    dense = formats.load_arguments().keys() - formats.load_arguments(quantized=True).keys()
    quantised = [name for name in asked if name not in dense]
    if options.full_finetuning and quantised:
        found.append(
            f"full_finetuning trains all weights, and weights loaded by {', '.join(quantised)} cannot train; drop one of them"
        )
    planned = [name for name in PLANNED_ARGUMENTS if name not in formats.load_arguments()]
    later = [name for name in planned if _value(options, name) not in (False, None)]
    return found + [not_yet(f"{name}={_value(options, name)!r}", PLANNED_ARGUMENTS[name]) for name in later]


def _value(options: LoadFields, argument: str) -> object:
    """Returns the value of a field, or of a keyword argument that belongs to a format and is not a field."""
    if argument in options.__dataclass_fields__:
        return getattr(options, argument)
    return options.extra.get(argument)
