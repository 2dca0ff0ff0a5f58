"""Reads a Linear with its LoRA as an operand of `ops.lora`, or says why the module's own forward must run.

One set of rules for every Linear, the head included: the base weight must be in a format that the ops take, at most one
plain LoRA may be active, and no module that the ops bypass may have hooks or its own forward (`is_watched`).
"""

from typing import Any

from hasten.ops.lora import LoraLinear
from hasten.weights.formats import find_format
from hasten.weights.peft_layers import base_layer_of, read_adapters, unwrap
from hasten.weights.watched import is_watched


def read_linear(module: Any, training: bool, moves_input: bool = False) -> LoraLinear | str:
    """Returns the Linear `module`, under PEFT or not, where weight, bias and at most one plain LoRA are all that it
    computes; else the reason why its own forward must run. Called at each forward, since adapters and hooks come and
    go.

    training: dropout acts. moves_input: see `is_watched`.
    """
    base, layers = unwrap(module)
    pair, reason = read_adapters(layers, training)
    if reason is not None:
        return reason
    watched = is_watched(base, moves_input) or (module is not base and is_watched(module, moves_input))
    if watched or (len(layers) > 1 and any(is_watched(layer, moves_input) for layer in layers)):
        return "hooks on the module"
    found = find_format(base)
    weight = f"held as {type(base).__name__}" if found is None else found.weight(base)
    if isinstance(weight, str):
        return weight
    if pair is None:
        return LoraLinear(weight, base.bias)  # pyright: ignore[reportArgumentType]
    return LoraLinear(weight, base.bias, pair.a_RE, pair.b_VR, pair.scale)  # pyright: ignore[reportArgumentType]


def read_head(module: Any, training: bool) -> LoraLinear | str:
    """As `read_linear`, for an op that takes the weight as a tensor and moves its input to it: `weight.stored` is a tensor."""
    linear = read_linear(module, training, moves_input=True)
    if not isinstance(linear, str) and linear.weight.stored is None:
        return f"held as {type(base_layer_of(module)).__name__}"
    return linear
