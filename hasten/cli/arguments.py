"""Defines arguments that several commands share. Choices come from the registries, which are imported only when
needed."""

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from hasten.units import parse_bytes


def one_of(values: Callable[[], list[str]]) -> Callable[[str], str]:
    """Returns an option's callback that refuses what is not in a registry, which is imported only when the option is
    used."""

    def check(value: str) -> str:
        if value not in values():
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(values())}")
        return value

    return check


def finite(value: float) -> float:
    """An option's callback that refuses NaN and infinity, which pass every comparison with a least value."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def byte_count(value: str | None) -> str | None:
    """An option's callback that refuses text that cannot be parsed as a size in bytes."""
    if value is not None:
        try:
            parse_bytes(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return value


def storage_choices() -> list[str]:
    """Returns the values of --load."""
    from hasten.weights import formats

    return formats.choices()


def default_storage() -> str:
    """Returns the value of --load where none is given."""
    from hasten.weights import formats

    return str(formats.default().choice)


def save_methods() -> list[str]:
    """Returns the values of --method."""
    from hasten.export import exporters

    return exporters.names()


class Checkpointing(StrEnum):
    """The modes of `use_gradient_checkpointing`."""

    off = "false"
    on = "true"
    offload = "offload"
    auto = "auto"


class Optimizer(StrEnum):
    """The optimizers of `estimate`."""

    adamw = "adamw"
    eight_bit = "adamw_8bit"
    paged = "paged"


ModelName = Annotated[str, typer.Argument(help="A folder or hub id: a model, or an adapter (its base is loaded too).")]
Load = Annotated[
    str,
    typer.Option(
        "--load",
        callback=one_of(storage_choices),
        default_factory=default_storage,
        metavar="FORMAT",
        help="Storage format of the weights: 16bit or a quantised one.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        callback=one_of(save_methods), help="Form of the written model: save_method of save_pretrained_merged."
    ),
]
