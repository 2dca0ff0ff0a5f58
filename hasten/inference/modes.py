"""Evaluation mode: to stay (`for_inference`; `hasten.training.for_training` is the way back), or inside a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hasten.state import causal_lm_of


def for_inference(model: Any) -> Any:
    """Evaluation mode, caches on, checkpointing off. Takes a causal LM or the PeftModel around it, and returns it.

    `for_training` brings back the checkpointing that the model was loaded with.
    """
    base = causal_lm_of(model)
    base.config.use_cache = True  # trainers leave it False
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    return model.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module has the mode that it had, whatever happened inside."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:
        model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
