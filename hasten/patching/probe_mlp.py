"""Finds the activation with which `MLPOverlay` computes what an MLP of a model type without a data file computes.

The projections are replaced by recorders that return chosen tensors, so the trial follows each tensor from one to the
next: the projections must get the input itself, `down_proj` must get act(gate) * up bit for bit, and its output must be
the result itself. Adapters, biases and weight formats of the projections make no difference to that.
"""

from typing import Any

import torch
from torch import nn

from hasten.ops import glu
from hasten.ops.glu import ACTIVATIONS
from hasten.overlays import MLPConfig
from hasten.patching.forward_names import read_forward
from hasten.patching.trial import DTYPES, Recorder, Refused, random, same, stand_in

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
OPERATIONS = frozenset({"torch", "nn", "functional", "F", *ACTIVATIONS})


def prove_mlp(module: nn.Module) -> MLPConfig:
    """The config of an overlay that computes what the module's class computes. Raises Refused."""
    activation, fitting = _check(module), list(ACTIVATIONS)
    for dtype in DTYPES:
        for training in (True, False):
            gate, up = _gates(dtype)
            hidden = _hidden(module, activation, (gate, up), training)
            fitting = [name for name in fitting if _equal(glu(gate, up, name), hidden)]
            if not fitting:
                short = str(dtype).removeprefix("torch.")
                raise Refused(f"its activation is none that hasten has, bit for bit ({short})")
    name = fitting[0]
    leaves = [tensor.requires_grad_() for tensor in _gates(torch.float32)]
    with torch.enable_grad():
        pair = (_hidden(module, activation, (leaves[0], leaves[1]), True), glu(leaves[0], leaves[1], name))
        theirs, ours = (torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in pair)
    if not all(map(_equal, ours, theirs)):
        raise Refused(f"its gradients are not those of {name}")
    return MLPConfig(name)


def _check(module: nn.Module) -> str | None:
    """The name of the attribute that holds the activation, None where the forward calls a function. Raises Refused."""
    names = read_forward(module)
    if isinstance(names, str):
        raise Refused(names)
    if len(names.parameters) != 1:
        raise Refused(f"its forward takes {', '.join(names.parameters)}; an MLP takes one tensor")
    extra = sorted(names.attributes - set(PROJECTIONS))
    activation = extra[0] if len(extra) == 1 and _is_activation(getattr(module, extra[0])) else None
    known = frozenset({*PROJECTIONS, activation} if activation else PROJECTIONS)
    if reason := names.unknown(known, OPERATIONS):
        raise Refused(reason)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    own |= {name for name, _ in module.named_buffers(recurse=False)} | {name for name, _ in module.named_children()}
    if more := sorted(own - known):
        raise Refused(f"it has {', '.join(more)} beside its projections and activation")
    return activation


def _is_activation(value: Any) -> bool:
    """Whether this is a function, or a module without weights and children."""
    if isinstance(value, nn.Module):
        return not list(value.children()) and not [*value.parameters(), *value.buffers()]
    return callable(value)


def _gates(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up) of shape (2, T, 1): dense where activations bend, and out to magnitudes where somebody may clamp."""
    bend = torch.linspace(-12, 12, 2001)
    far = torch.logspace(-8, 6, 200)
    gate = torch.cat([bend, far, -far, torch.zeros(1)])
    up = random(len(gate), seed=1) * 10 ** random(len(gate), seed=2).clamp(-3, 3)
    both = torch.stack([gate, gate.flip(0)])[..., None], torch.stack([up, -up])[..., None]
    return both[0].to(dtype), both[1].to(dtype)


def _hidden(
    module: nn.Module, activation: str | None, projected: tuple[torch.Tensor, torch.Tensor], training: bool
) -> torch.Tensor:
    """What `down_proj` gets where the others return `projected` (gate, up). Raises Refused for another dataflow."""
    gate, up = projected
    x, out = random(*gate.shape, dtype=gate.dtype), random(*gate.shape, dtype=gate.dtype)
    children = {"gate_proj": Recorder(lambda x: gate), "up_proj": Recorder(lambda x: up)}
    children["down_proj"] = Recorder(lambda x: out)
    others = {activation: getattr(module, activation)} if activation in dict(module.named_children()) else {}
    made = stand_in(module, {}, {**children, **others})
    before = {name: child.training for name, child in others.items()}
    try:
        result = made.train(training)(x)
    finally:
        for name, child in others.items():
            child.train(before[name])
    for name in PROJECTIONS:
        calls = children[name].calls
        if len(calls) != 1 or calls[0][1] or len(calls[0][0]) != 1:
            raise Refused(f"it does not call {name} once with one tensor")
    if not same(result, out):
        raise Refused("its result is not down_proj's output itself")
    if not all(same(children[name].calls[0][0][0], x) for name in PROJECTIONS[:2]):
        raise Refused("gate_proj and up_proj do not get its input itself")
    return children["down_proj"].calls[0][0][0]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits, shape and dtype; a NaN equals a NaN."""
    if not isinstance(other, torch.Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
