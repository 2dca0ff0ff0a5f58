"""`--adapter`: adapters that are checked before their base is loaded, and of which one at a time is active."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hasten.errors import InputError
from hasten.suggest import did_you_mean

if TYPE_CHECKING:
    from hasten.loading.adapter_preflight import CheckedAdapter

NONE = "none"
"""The name of the base without an adapter."""


def check_adapters(given: Sequence[str], model: str) -> dict[str, "CheckedAdapter"]:
    """Returns name -> adapter. given: FOLDER, whose last part is the name, or NAME=FOLDER.

    Raises BadParameter for equal names, CheckpointError for an adapter that does not fit `model`.
    """
    named: dict[str, str] = {}
    for one in given:
        name, separator, folder = one.partition("=")
        if not separator or Path(one).is_dir():
            name, folder = Path(one).name or one, one
        if name in named:
            raise typer.BadParameter(f"--adapter: two adapters are named {name!r}; pass NAME=FOLDER")
        if name in ("", NONE):
            raise typer.BadParameter(f"--adapter: an adapter cannot be named {name!r}; pass NAME=FOLDER")
        named[name] = folder
    if not named:
        return {}
    from hasten.loading.adapter_preflight import preflight
    from hasten.options import LoadOptions

    options = LoadOptions(model_name=model)
    return {name: preflight(folder, options) for name, folder in named.items()}


class Adapters:
    """model, tokenizer: with the active adapter. active: its name."""

    def __init__(self, model: Any, tokenizer: Any, checked: Mapping[str, "CheckedAdapter"]) -> None:
        """Attaches the first one, if there is any. model: the base."""
        self._base, self._own, self._checked = model, tokenizer, checked
        self.model, self.tokenizer, self.active = model, tokenizer, NONE
        if checked:
            self.use(next(iter(checked)))

    @property
    def names(self) -> list[str]:
        return [*self._checked, NONE]

    def use(self, name: str) -> None:
        """Makes another adapter the active one; "none" = the base alone. Raises InputError for an unknown name."""
        if name not in self.names:
            raise InputError(
                f"there is no adapter {name!r}{did_you_mean(name, self.names)}; there is {', '.join(self.names)}"
            )
        if self.active != NONE:
            remove = getattr(self.model.base_model, "unload", None)  # adapters that only add to the prompt have none
            if remove is not None:
                remove()
            self.model, self.tokenizer, self.active = self._base, self._own, NONE
        if name != NONE:
            from hasten.loading.adapter import attach

            chosen = self._checked[name]
            self.model = attach(self._base, chosen.folder, trainable=False)
            self.tokenizer, self.active = chosen.tokenizer or self._own, name
