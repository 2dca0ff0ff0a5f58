"""Sets evaluation mode: until `hasten.training.for_training` (`for_inference`), or inside a block (`evaluating`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hasten.state import causal_lm_of


def for_inference(model: Any) -> Any:
    """Sets evaluation mode, KV caches on, activation checkpointing off. Takes and returns a causal LM or its PeftModel.

    `for_training` restores the checkpointing that the model was loaded with.
    """
    base = causal_lm_of(model)
    base.config.use_cache = True  # trainers leave use_cache False
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    return model.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode inside the block and restores each module's own mode after it, also after an exception."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:
        model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
