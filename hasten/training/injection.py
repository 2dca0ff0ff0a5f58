"""Makes PEFT's layers in a model: completely, or not at all if PEFT refuses or would ignore an option."""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, get_peft_model

from hasten.errors import HastenError, OptionError

IGNORED = re.compile(
    r"ignored|no (module|parameter) was matched|no modules were excluded|no tied modules|not be applied|not supported|"
    r"will be turned off|no effect",
    re.I,
)
"""How PEFT warns of an option without an effect."""
USUAL = re.compile(r"fan_in_fan_out is set to|_pattern keys did not match")
"""PEFT's warnings of what has been taken care of: Linear and Conv1D layers in one adapter, which it handles one by one,
and keys of patterns, where its own conversions for fused layers add some that match nothing."""
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, ImportError)


def inject(model: Any, config: LoraConfig) -> Any:
    """Returns `get_peft_model(model, config)`. Raises OptionError for what PEFT refuses, and for what it warns to ignore;
    passes on its other warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            peft_model = get_peft_model(model, config)
        except HastenError:
            raise
        except REFUSALS as error:
            raise OptionError("get_peft_model", [f"PEFT refuses these options: {error}"]) from error
    left = [one for one in seen if not USUAL.search(str(one.message))]
    ignored = [str(one.message) for one in left if IGNORED.search(str(one.message))]
    if ignored:
        raise OptionError("get_peft_model", [f"PEFT would ignore an option: {message}" for message in ignored])
    names = {getattr(module, "__file__", None): name for name, module in sys.modules.copy().items()} if left else {}
    for one in left:  # with the module that warned, by which filters know them
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, names.get(one.filename))
    return peft_model


@contextmanager
def unchanged_on_error(model: Any) -> Iterator[None]:
    """Gives the model its modules, attributes, config and trainable flags back if the body raises."""
    children = [(module, dict(module._modules)) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    holders = [(holder, dict(vars(holder))) for holder in (model, model.config)]
    try:
        yield
    except BaseException:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for parameter, flag in trains:
            parameter.requires_grad_(flag)
        for holder, attributes in holders:
            vars(holder).clear()
            vars(holder).update(attributes)
        raise
