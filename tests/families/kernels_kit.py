"""Tiny models for the tests of the paths that models take on a GPU."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model


def lora(model: Any, r: int = 4, **kwargs: Any) -> Any:
    """PEFT's LoRA on all linears, with a B that is not zero."""
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=r, lora_alpha=8, target_modules="all-linear", **kwargs))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted
