"""Names the KV cache among arguments and outputs as the installed transformers does: `cache` since 5.24, before that
`past_key_values`, which 5.24 still takes with a warning."""

import warnings
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

OLD_CACHE = "past_key_values"
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else OLD_CACHE


def with_cache_name(arguments: dict[str, Any], function: str) -> dict[str, Any]:
    """Returns the arguments of a call with the cache under `CACHE`, and warns of the old name as transformers does.
    `CACHE` wins where both are given. function: what the warning calls the function that was called."""
    if CACHE == OLD_CACHE or OLD_CACHE not in arguments:
        return arguments
    if not torch.compiler.is_compiling():
        message = f"`{OLD_CACHE}` is deprecated since transformers 5.24 for `{function}`. Use `{CACHE}` instead."
        warnings.warn(message, FutureWarning, stacklevel=3)
    others = {name: value for name, value in arguments.items() if name != OLD_CACHE}
    return {CACHE: arguments[OLD_CACHE], **others}
