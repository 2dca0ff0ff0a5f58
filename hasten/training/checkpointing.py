"""Switches activation checkpointing: save everything, recompute every layer, or let the memory policy plan
(`memory.policy`)."""

from typing import Any

from hasten.errors import OptionError
from hasten.options import CHECKPOINTING, PLANNED
from hasten.state import causal_lm_of, state_of
from hasten.training.memory.policy import MemoryPolicy, policy_of
from hasten.training.tiling import requested_tile

RECOMPUTED = "each layer is recomputed in the backward"
OFFLOADED = f"{RECOMPUTED} from its input, which is offloaded to CPU memory"


def enable(model: Any, mode: bool | str, budget: int | None = None) -> list[str]:
    """Sets the activation checkpointing of `model` (a causal LM or the PeftModel around it) and returns notes for the
    report.

    mode: False saves all activations; True saves each layer's input and recomputes the layer in the backward; "offload"
    also offloads these inputs to pinned CPU memory; "auto" and "unsloth" plan per layer, when the first batch of a
    shape comes; "unsloth", the default, saves all activations where transformers cannot recompute the model's layers. budget: bytes on the device that "auto" may use in all, None = what is free at that time. Uses
    transformers' own switch, so that a trainer that sets it as well works as usual. Raises OptionError for any other
    mode, and for a model class that transformers cannot checkpoint; the model is then unchanged.
    """
    _check(model, mode)
    base = causal_lm_of(model)
    asked, mode = mode, mode if mode != "unsloth" or base.supports_gradient_checkpointing else False
    earlier = policy_of(base)
    switch_off(base)
    state = state_of(base)
    state.checkpointing = mode
    policy = MemoryPolicy(base, "auto" if mode == "unsloth" else mode, budget, requested_tile(base, mode in PLANNED))
    policy.continue_from(earlier)
    if not mode:
        state.memory = policy  # for its advice
        why = f": transformers cannot recompute the layers of {type(base).__name__}" if asked else ""
        return [f"off: all activations are saved{why}"]
    _switch_on(base)
    if not policy.install():
        return [f"{RECOMPUTED} (no layer runs as a hasten overlay, so nothing else can be planned)"]
    state.memory = policy
    base.disable_input_require_grads()  # needed only for reentrant checkpointing; it would compute an unused gradient of the first layer's input
    return [_note(mode, budget, len(policy.devices()))]


def _note(mode: bool | str, budget: int | None, devices: int) -> str:
    if mode is True:
        return RECOMPUTED
    if mode == "offload":
        return OFFLOADED
    if devices > 1:
        return f'"{mode}" plans for one device, but the layers are on {devices} devices, so {OFFLOADED}'
    limit = "what is free" if budget is None else f"{budget / 2**30:.1f} GiB"
    return f'"{mode}" plans what each layer saves, recomputes or offloads, within {limit}'


def switch_off(base: Any) -> None:
    """Saves all activations from now on. The last setting of `enable` stays recorded for `restore`."""
    if is_on(base):
        # Renamed in transformers 5.23; the old name warns there.
        name = "activation_checkpointing_disable"
        getattr(base, name if hasattr(base, name) else "gradient_checkpointing_disable")()
    # transformers does not remove the hooks that its switch adds to the embedding, and adds more each time.
    base.disable_input_require_grads()
    policy = policy_of(base)
    if policy is not None:
        policy.uninstall()
        state_of(base).memory = None


def _switch_on(base: Any) -> None:
    name = "activation_checkpointing_enable"
    switch = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
    switch({"use_reentrant": False})


def is_on(base: Any) -> bool:
    """Returns whether any layer is checkpointed. (transformers' own property was renamed in 5.23; the old name warns
    there.)"""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def restore(model: Any) -> None:
    """Sets checkpointing as `enable` last did; a model on which it was never called stays as it is."""
    base = causal_lm_of(model)
    asked = state_of(base).checkpointing
    if asked is not None and bool(asked) != is_on(base):
        policy = policy_of(base)
        enable(model, asked, None if policy is None else policy.budget)


def _check(model: Any, mode: Any) -> None:
    problems = []
    if not any(mode is known or (isinstance(mode, str) and mode == known) for known in CHECKPOINTING):
        problems.append(f'use_gradient_checkpointing={mode!r} must be False, True, "offload", "unsloth" or "auto"')
    elif mode and mode != "unsloth" and not causal_lm_of(model).supports_gradient_checkpointing:
        kind = type(causal_lm_of(model)).__name__
        problems.append(f"transformers cannot recompute the layers of {kind}; use use_gradient_checkpointing=False")
    if problems:
        raise OptionError("checkpointing", problems)
