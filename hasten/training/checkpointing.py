"""Switches what layers keep for the backward: nothing is recomputed, everything is, or the memory policy decides (`memory.policy`)."""

from typing import Any

from hasten.errors import OptionError
from hasten.options import CHECKPOINTING, PLANNED
from hasten.state import causal_lm_of, state_of
from hasten.training.memory.policy import MemoryPolicy, policy_of
from hasten.training.tiling import asked_tile


def enable(model: Any, mode: bool | str, budget: int | None = None) -> list[str]:
    """Sets the checkpointing of `model` (a causal LM or the PeftModel around it) and returns notes for the report.

    mode: False keeps every activation; True keeps each layer's input and recomputes the rest in the backward; "offload" does
    the same with the inputs in host memory; "auto" and "unsloth" plan for each layer what fits, when the first batch of a shape
    comes. budget: bytes of the device that "auto" may use in all, None = what is free by then. Goes through transformers' own
    switch, so a trainer that switches it as well finds what it expects. Raises OptionError for any other mode, and for a model
    whose class transformers cannot checkpoint; the model is then unchanged.
    """
    _check(model, mode)
    base = causal_lm_of(model)
    before = policy_of(base)
    switch_off(base)
    state = state_of(base)
    state.checkpointing = mode
    policy = MemoryPolicy(base, "auto" if mode == "unsloth" else mode, budget, asked_tile(base, mode in PLANNED))
    policy.others = None if before is None else before.others  # by now moments lie beside the weights
    if not mode:
        state.memory = policy  # for its advice
        return ["off, every activation is kept"]
    # Renamed in transformers 5.23; the old name warns there.
    name = "activation_checkpointing_enable"
    switch = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
    switch({"use_reentrant": False})
    if not policy.install():
        return [
            "each layer is recomputed in the backward (no layer runs under an overlay, so nothing else can be chosen)"
        ]
    state.memory = policy
    base.disable_input_require_grads()  # only torch's older, reentrant way needs it; it costs the first layer's gradient
    if mode is True:
        return ["each layer is recomputed in the backward"]
    if mode == "offload":
        return ["each layer is recomputed in the backward from its input, which waits in host memory"]
    if len(policy.devices()) > 1:
        return [
            f'"{mode}" plans for one device and the layers lie on {len(policy.devices())}: each is recomputed in the backward '
            "from its input, which waits in host memory"
        ]
    limit = "what is free" if budget is None else f"{budget / 2**30:.1f} GiB"
    return [f'"{mode}" plans what each layer keeps, within {limit}']


def switch_off(base: Any) -> None:
    """Keeps every activation from now on. What `enable` was last asked for stays on record, for `restore`."""
    if is_on(base):
        name = "activation_checkpointing_disable"
        getattr(base, name if hasattr(base, name) else "gradient_checkpointing_disable")()
    # transformers leaves the hooks that its switch put on the embedding, and puts on more each time.
    base.disable_input_require_grads()
    policy = policy_of(base)
    if policy is not None:
        policy.uninstall()
        state_of(base).memory = None


def is_on(base: Any) -> bool:
    """Whether any layer asks what to keep. (transformers' own property was renamed in 5.23; the old name warns there.)"""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def restore(model: Any) -> None:
    """Checkpointing as `enable` last set it; a model on which it never was called stays as it is."""
    base = causal_lm_of(model)
    asked = state_of(base).checkpointing
    if asked is not None and bool(asked) != is_on(base):
        policy = policy_of(base)
        enable(model, asked, None if policy is None else policy.budget)


def _check(model: Any, mode: Any) -> None:
    problems = []
    if not any(mode is known or (isinstance(mode, str) and mode == known) for known in CHECKPOINTING):
        problems.append(f'use_gradient_checkpointing={mode!r} is none of False, True, "offload", "unsloth", "auto"')
    elif mode and not causal_lm_of(model).supports_gradient_checkpointing:
        kind = type(causal_lm_of(model)).__name__
        problems.append(f"transformers cannot recompute the layers of {kind}; use use_gradient_checkpointing=False")
    if problems:
        raise OptionError("checkpointing", problems)
