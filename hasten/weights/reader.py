"""Reads a Linear with its LoRA as an operand of `ops.lora`, or says why the module's own forward must run.

The same conditions hold for every Linear, the head included: the base weight is in a format that the ops read, at most
one plain LoRA is active, and no module that the ops bypass has hooks or a forward of its own (`needs_own_forward`).
"""

from typing import Any

from torch import nn

from hasten.ops.lora import LoraLinear
from hasten.weights.formats import find_format, packages
from hasten.weights.own_forward import hooks_on_every_module, needs_own_forward, runs_forward_of
from hasten.weights.peft_layers import base_layer_of, descend, read_adapters

LIBRARIES = ("torch", "peft", "hasten", *packages())
"""Packages whose Linear-like classes compute each token by itself."""


def read_linear(module: Any, training: bool, moves_input: bool = False) -> LoraLinear | str:
    """Returns `module` (a Linear, with or without PEFT's wrapper) as an operand if it computes only a weight, a bias
    and at most one plain LoRA; else the reason why its own forward must run. Called at each forward, since adapters and
    hooks may change.

    training: dropout is active. moves_input: see `needs_own_forward`.
    """
    if hooks_on_every_module():
        return "hooks on every module (torch's global module hooks)"
    base, pair = module, None
    if type(module) is not nn.Linear:  # else nothing is around it
        base, layers, around = descend(module)
        pair, reason = read_adapters(layers, training)
        if reason is not None:
            return reason
        for wrapper in around:
            if needs_own_forward(wrapper, moves_input):
                return "hooks on the module"
    if needs_own_forward(base, moves_input):
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


def head_is_watched(module: Any) -> bool:
    """Returns whether the head must run as transformers runs it: its own forward, once, over all positions.

    True where the head or a module inside it is watched or parametrized, or belongs to a class of a user: such a head
    may count its calls, look at other positions, or change its output. A head of a library's class that only cannot be
    fused (dropout, DoRA) computes each token by itself, and may run a chunk of tokens at a time.
    """
    if hooks_on_every_module():
        return True
    for one in module.modules():
        if needs_own_forward(one, moves_input=True) or not (
            runs_forward_of(type(one), LIBRARIES) or _is_container(one)
        ):
            return True
    return False


def _is_container(module: nn.Module) -> bool:
    """Returns whether the module only holds others (ModuleDict, ParameterDict) and is never called."""
    return isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList))
