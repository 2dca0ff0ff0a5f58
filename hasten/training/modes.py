"""`for_training`, the counterpart of `hasten.inference.for_inference`."""

from typing import Any

from hasten.state import causal_lm_of
from hasten.training import checkpointing


def for_training(model: Any) -> Any:
    """Prepares a causal LM, or the PeftModel around it, for training, and returns it.

    Sets training mode, switches the KV cache off (a recomputed layer would write to it twice, and training does not
    read it), and restores the activation checkpointing of `from_pretrained` or `get_peft_model`. Does not change which
    weights train.
    """
    model.train()
    causal_lm_of(model).config.use_cache = False
    checkpointing.restore(model)
    return model
