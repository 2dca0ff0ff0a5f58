"""Reads a Linear with its LoRA as an operand of `ops.lora`, or says why the module's own forward must run.

The same conditions hold for every Linear, the head included: the base weight is in a format that the ops read, at most
one plain LoRA is active, and no module that the ops bypass has hooks or its own forward (`needs_own_forward`).
"""

from typing import Any

from hasten.ops.lora import LoraLinear
from hasten.weights.formats import find_format
from hasten.weights.own_forward import needs_own_forward
from hasten.weights.peft_layers import base_layer_of, read_adapters, unwrap


def read_linear(module: Any, training: bool, moves_input: bool = False) -> LoraLinear | str:
    """Returns `module` (a Linear, with or without PEFT's wrapper) as an operand if it computes only a weight, a bias
    and at most one plain LoRA; else the reason why its own forward must run. Called at each forward, since adapters and
    hooks may change.

    training: dropout is active. moves_input: see `needs_own_forward`.
    """
    base, layers = unwrap(module)
    pair, reason = read_adapters(layers, training)
    if reason is not None:
        return reason
    own_forward = needs_own_forward(base, moves_input) or (
        module is not base and needs_own_forward(module, moves_input)
    )
    if own_forward or (len(layers) > 1 and any(needs_own_forward(layer, moves_input) for layer in layers)):
        return "hooks on the module"
    found = find_format(base)
    weight = f"stored as {type(base).__name__}" if found is None else found.weight(base)
    if isinstance(weight, str):
        return weight
    if pair is None:
        return LoraLinear(weight, base.bias)  # pyright: ignore[reportArgumentType]
    return LoraLinear(weight, base.bias, pair.a_RE, pair.b_VR, pair.scale)  # pyright: ignore[reportArgumentType]


def read_head(module: Any, training: bool) -> LoraLinear | str:
    """Does what `read_linear` does, for an op that needs the weight as a tensor (`weight.stored`) and moves its input
    to the weight's device."""
    linear = read_linear(module, training, moves_input=True)
    if not isinstance(linear, str) and linear.weight.stored is None:
        return f"stored as {type(base_layer_of(module)).__name__}"
    return linear
