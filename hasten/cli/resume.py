"""`--resume` of `hasten train`, an option whose value may be left out."""

from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand

RESUME_CHOICES: Mapping[str | None, bool | str] = {None: False, "last": True, "force": "force"}
"""Values of --resume -> the argument of `hasten.training.job.run`. A bare --resume means last."""


class TrainCommand(TyperCommand):
    """Puts in the value of a bare `--resume`: typer has no options with an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's."""
        filled = []
        for number, word in enumerate(args):
            filled.append(word)
            if word == "--resume" and args[number + 1 : number + 2] not in (["force"], ["last"]):
                filled.append("last")
        return super().parse_args(ctx, filled)


def resume_choice(value: str | None) -> str | None:
    """Refuses other values."""
    if value not in RESUME_CHOICES:
        raise typer.BadParameter(f"{value!r}: give --resume alone, or --resume force")
    return value
