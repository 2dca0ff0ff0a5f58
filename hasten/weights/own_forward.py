"""Detects a module whose own forward must run because of hooks, parametrizations or a replaced forward."""

from typing import Any

from accelerate.hooks import AlignDevicesHook


def needs_own_forward(module: Any, moves_input: bool = False) -> bool:
    """Returns whether the module's own forward must run: it has forward or backward hooks, parametrizations, or its own
    forward.

    moves_input: the caller moves the input to the weight's device, so that an accelerate hook that only does the same
    may be skipped.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    if "forward" in own and not (moves_input and _only_moves_tensors(own.get("_hf_hook"))):
        return True
    return "parametrizations" in own["_modules"]


def _only_moves_tensors(hook: Any) -> bool:
    return type(hook) is AlignDevicesHook and not hook.offload
