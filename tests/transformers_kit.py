"""What transformers names differently from release to release."""

from typing import Any


def recompute(model: Any, **settings: Any) -> None:
    """Switch transformers' own activation checkpointing on. settings: of torch's checkpoint, such as use_reentrant."""
    new = "activation_checkpointing_enable"  # renamed in 5.23; the old name warns there
    getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")(settings or None)
