"""What differs in transformers from release to release."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig


def recompute(model: Any, **settings: Any) -> None:
    """Switch transformers' own activation checkpointing on. settings: of torch's checkpoint, such as use_reentrant."""
    new = "activation_checkpointing_enable"  # renamed in 5.23; the old name warns there
    getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")(settings or None)


def exact_attention(folder: Path | str) -> dict[str, str]:
    """Arguments of stock's from_pretrained: eager for a softcap on scores, which sdpa, 5.17's default for Gemma 2, drops."""
    softcap = getattr(AutoConfig.from_pretrained(str(folder)), "attn_logit_softcapping", None)
    return {} if softcap is None else {"attn_implementation": "eager"}
