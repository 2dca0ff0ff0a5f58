"""`AdapterOptions`: the arguments of `get_peft_model` with every check over them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from hasten.errors import OptionError
from hasten.options import checkpointing, loftq, lora, qat
from hasten.options.call import fields_from_call
from hasten.options.fields import AdapterFields

ADAPTER_CHECKS: tuple[Callable[[AdapterFields], list[str]], ...] = (
    lora.check,
    checkpointing.check,
    loftq.check,
    qat.check,
)
"""One check per feature; each returns the problems that it finds, with what to do instead."""


@dataclass(frozen=True)
class AdapterOptions(AdapterFields):
    """The arguments of `get_peft_model` (see `AdapterFields`) and the checks over them."""

    @classmethod
    def from_call(cls, *args: Any, extra: Mapping[str, Any] | None = None, **named: Any) -> Self:
        """Builds the options; lists of names become tuples, so that two calls with the same names compare equal."""
        options = cls(**fields_from_call(cls, args, {**named, **(extra or {})}))
        lists = {name: getattr(options, name) for name in ("target_modules", "modules_to_save")}
        tuples = {name: tuple(v) for name, v in lists.items() if isinstance(v, Iterable) and not isinstance(v, str)}
        return dataclasses.replace(options, **tuples)

    def problems(self) -> list[str]:
        """Returns every problem of the call that can be found without the model."""
        return [problem for check in ADAPTER_CHECKS for problem in check(self)]

    def validate(self) -> None:
        """Raises OptionError with all `problems`, if any."""
        if found := self.problems():
            raise OptionError("get_peft_model", found)
