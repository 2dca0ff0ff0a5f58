"""Detects a module whose own forward must run because somebody watches or changes it: hooks, parametrizations, or a
replaced forward."""

import functools
from collections.abc import Callable
from typing import Any

from accelerate.hooks import AlignDevicesHook
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)


def hooks_on_every_module() -> bool:
    """Returns whether torch's global module hooks are in use (`register_module_forward_hook` and the like). Each of
    them expects a call of every module."""
    return bool(
        _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks
    )


def is_watched(module: Any, moves_input: bool = False) -> bool:
    """Returns whether a call of this module does more than its class's forward: it has forward or backward hooks, or a
    forward of its own. Does not look for global hooks (`hooks_on_every_module`), which a caller checks once for all its
    modules.

    moves_input: the caller moves the input to the weight's device, so that an accelerate hook that only does the same
    may be skipped.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    if "forward" in own and not (moves_input and _only_moves_tensors(own.get("_hf_hook"))):
        return True
    return "_call_impl" in own or "_compiled_call_impl" in own  # the latter: module.compile()


def needs_own_forward(module: Any, moves_input: bool = False) -> bool:
    """Returns whether the module's own forward must run: it is watched (see `is_watched`) or has parametrizations."""
    return is_watched(module, moves_input) or "parametrizations" in module.__dict__["_modules"]


def runs_forward_of(kind: type[nn.Module], packages: tuple[str, ...]) -> bool:
    """Returns whether calling an instance of `kind` runs a forward that one of these packages defines, and nothing else.
    False for a class of a user that overrides `forward` or `__call__`, and where the `forward` of a package's class was
    replaced."""
    return kind.__call__ is nn.Module.__call__ and _is_of(kind.forward, packages)


@functools.lru_cache(maxsize=256)
def _is_of(forward: Callable[..., Any], packages: tuple[str, ...]) -> bool:
    return getattr(forward, "__module__", "").partition(".")[0] in packages


def _only_moves_tensors(hook: Any) -> bool:
    return type(hook) is AlignDevicesHook and not hook.offload
