"""Which activations are kept for the backward and which are recomputed (Chen et al. 2016, arXiv:1604.06174)."""

from typing import Any

from hasten.errors import OptionError
from hasten.patching.plan import causal_lm_of

MODES = (False, True, "unsloth", "auto")
RECORD = "_hasten_checkpointing"


def enable(model: Any, mode: bool | str) -> list[str]:
    """Sets the checkpointing of `model` (a causal LM or the PeftModel around it) and returns notes for the report.

    mode: False keeps every activation; True keeps each layer's input and recomputes the rest in the backward;
    "unsloth" and "auto" do the same as True for now. Goes through transformers' own switch, so a trainer that switches
    it as well finds what it expects. Raises OptionError for "offload", for any other mode, and for a model whose class
    transformers cannot checkpoint; the model is then unchanged.
    """
    _check(model, mode)
    base = causal_lm_of(model)
    switch_off(base)
    if mode:
        # Renamed in transformers 5.23; the old name warns there.
        name = "activation_checkpointing_enable"
        switch = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
        switch({"use_reentrant": False})
    base.__dict__[RECORD] = mode
    if not mode:
        return ["off, every activation is kept"]
    asked = f' ("{mode}" recomputes plainly for now, nothing is offloaded)' if isinstance(mode, str) else ""
    return [f"each layer is recomputed in the backward{asked}"]


def switch_off(base: Any) -> None:
    """Keeps every activation from now on. What `enable` was last asked for stays on record, for `restore`."""
    if is_on(base):
        name = "activation_checkpointing_disable"
        getattr(base, name if hasattr(base, name) else "gradient_checkpointing_disable")()
    # transformers leaves the hooks that its switch put on the embedding, and puts on more each time.
    base.disable_input_require_grads()


def is_on(base: Any) -> bool:
    """Whether any layer is recomputed. (transformers' own property was renamed in 5.23; the old name warns there.)"""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def restore(model: Any) -> None:
    """Checkpointing as `enable` last set it; a model on which it never was called stays as it is."""
    base = causal_lm_of(model)
    if RECORD in base.__dict__ and bool(base.__dict__[RECORD]) != is_on(base):
        enable(model, base.__dict__[RECORD])


def _check(model: Any, mode: Any) -> None:
    problems = []
    if mode == "offload":
        problems.append(
            'use_gradient_checkpointing="offload" keeps layer inputs in host memory, which this version cannot do yet; '
            "use True (layer inputs stay on the device)"
        )
    elif not any(mode is known or (isinstance(mode, str) and mode == known) for known in MODES):
        problems.append(f'use_gradient_checkpointing={mode!r} is none of False, True, "unsloth", "auto"')
    elif mode and not causal_lm_of(model).supports_gradient_checkpointing:
        kind = type(causal_lm_of(model)).__name__
        problems.append(f"transformers cannot recompute the layers of {kind}; use use_gradient_checkpointing=False")
    if problems:
        raise OptionError("checkpointing", problems)
