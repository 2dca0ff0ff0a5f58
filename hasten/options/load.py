"""`LoadOptions`: the arguments of `from_pretrained` with every check over them."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from hasten.errors import OptionError
from hasten.options import (
    arguments,
    attention,
    checkpointing,
    device,
    embedding,
    engine,
    precision,
    qat,
    rope,
    source,
    tiling,
    tokenizer,
    weights,
)
from hasten.options.call import fields_from_call
from hasten.options.engine import EngineOptions
from hasten.options.fields import LoadFields
from hasten.options.values import Rule, broken_rules
from hasten.schema import fields_of, mistyped

LOAD_RULES: Mapping[str, Rule] = {
    **source.RULES,
    **rope.RULES,
    **precision.RULES,
    **device.RULES,
    **tokenizer.RULES,
    **attention.RULES,
    **tiling.RULES,
    **engine.RULES,
}
"""Argument -> the validator of its value."""

LOAD_CHECKS: tuple[Callable[[LoadFields], list[str]], ...] = (
    checkpointing.check,
    weights.check,
    precision.check,
    embedding.check,
    engine.check,
    qat.check,
    arguments.check,
)
"""One check per feature; each returns the problems that it finds, with what to do instead."""


OWN_CHECKS = ("use_gradient_checkpointing", "memory_budget", "extra")
"""Arguments whose type is looked at by the check of their feature."""


def bad_values(options: LoadFields) -> dict[str, str]:
    """Returns {argument: problem} for each argument whose value is invalid, independently of the other arguments."""
    typed = {
        name: kind for name, kind in fields_of(LoadFields.__module__, "LoadFields").items() if name not in OWN_CHECKS
    }
    values = {name: getattr(options, name) for name in typed if name not in LOAD_RULES}
    return {**mistyped(values, typed), **broken_rules(options, LOAD_RULES)}


@dataclass(frozen=True)
class LoadOptions(LoadFields):
    """The arguments of `from_pretrained` (see `LoadFields`) and values derived from them."""

    @classmethod
    def from_call(cls, *args: Any, extra: Mapping[str, Any] | None = None, **named: Any) -> Self:
        """Builds the options; names among `extra` or `named` that are fields become fields, the rest `extra`. A path
        as `model_name` becomes a string."""
        fields = fields_from_call(cls, args, {**named, **(extra or {})})
        if isinstance(fields.get("model_name"), os.PathLike):
            fields["model_name"] = os.fspath(fields["model_name"])
        return cls(**fields)

    @property
    def asked_storage(self) -> list[str]:
        """The arguments with which the caller asked for a weight format, or for a quantiser of transformers."""
        return weights.asked_storage(self)

    @property
    def own_quantization(self) -> bool:
        """Whether the caller's quantization_config decides how weights are quantised."""
        return weights.OWN_ARGUMENT in self.asked_storage

    @property
    def weight_format(self) -> str | None:
        """The name of the weight format that was asked for, or of the default; None where weights stay as the
        checkpoint stores them, and with `own_quantization`. Meaningful once validated.
        """
        return weights.weight_format(self)

    @property
    def engine_options(self) -> EngineOptions:
        """The arguments of the vLLM engine."""
        return EngineOptions.of(self)

    def readable(self) -> Self:
        """Returns a copy with invalid values replaced by their defaults, so that everything else can still be
        checked."""
        defaults = type(self)()
        return dataclasses.replace(self, **{name: getattr(defaults, name) for name in bad_values(self)})

    def problems(self) -> list[str]:
        """Returns every problem of the call that can be found without the checkpoint's config."""
        return [*bad_values(self).values(), *(problem for check in LOAD_CHECKS for problem in check(self))]

    def validate(self) -> None:
        """Raises OptionError with all `problems`, if any."""
        if found := self.problems():
            raise OptionError("from_pretrained", found)
