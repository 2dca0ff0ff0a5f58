"""Quantises every Linear of a model in memory except the head, for tests."""

from typing import Any

from torch import nn

from hasten.errors import MissingExtraError
from hasten.weights import formats


def quantize_linears(model: Any, name: str | None = None) -> Any:
    """Replaces every Linear but `lm_head` in place and returns the model. name: of the format, None = the default one.

    Raises MissingExtraError where the format's package is not installed.
    """
    into = formats.default() if name is None else formats.named(name)
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path.endswith("lm_head"):
            continue
        try:
            model.set_submodule(path, into.convert(module))
        except ImportError as error:
            package = into.package or into.name
            raise MissingExtraError("Quantising a tiny model", package, into.extra or package) from error
    into.mark(model)
    return model
