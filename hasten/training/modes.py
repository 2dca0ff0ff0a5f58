"""Training mode, the counterpart of `hasten.inference.for_inference`."""

from typing import Any

from hasten.state import causal_lm_of
from hasten.training import checkpointing


def for_training(model: Any) -> Any:
    """Puts a causal LM, or the PeftModel around it, into the state that training needs, and returns it.

    Training mode; no key-value cache (a layer that is recomputed would write to it twice, and nothing reads it);
    checkpointing as it was asked for when the model was loaded or got its adapter. Which weights train is unchanged.
    """
    model.train()
    causal_lm_of(model).config.use_cache = False
    checkpointing.restore(model)
    return model
