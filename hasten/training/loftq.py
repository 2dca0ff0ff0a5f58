"""LoftQ (Li et al. 2023, arXiv:2310.08659), one iteration: a LoRA that starts as the best low-rank repair of quantisation.

With Q the quantised weight that the model holds and W the checkpoint's: scale * B @ A is the rank-r part of W - Q that a
truncated SVD gives. Q stays what it is, so the same checkpoint and adapter give the same model again.
"""

from collections.abc import Callable
from typing import Any

import torch

from hasten.errors import OptionError
from hasten.weights import base_layer_of, dequantize, storage_of

BITS = {"nf4": 4, "fp4": 4, "int8": 8}


def problems(model: Any, config: dict[str, Any]) -> list[str]:
    """Why LoftQ cannot be done as asked on `model`; empty = it can."""
    found = []
    unknown = sorted(set(config) - {"loftq_bits", "loftq_iter"})
    if unknown:
        found.append(f"loftq_config has {unknown}; its fields are loftq_bits and loftq_iter")
    if config.get("loftq_iter", 1) != 1:
        found.append(
            f"loftq_iter={config['loftq_iter']}: further iterations would change the quantised base, which then no "
            "longer is what the checkpoint gives; use 1"
        )
    bits = {BITS.get(storage_of(m), 16) for m in model.modules() if "Linear" in type(m).__name__} - {16}
    if not bits:
        found.append("loftq_config needs a quantised base to repair; load with load_in_4bit=True or load_in_8bit=True")
    elif config.get("loftq_bits", 4) not in bits:
        found.append(f"loftq_bits={config.get('loftq_bits', 4)}, but the base holds {sorted(bits)} bits")
    return found


def initialise(peft_model: Any, read: Callable[[str], torch.Tensor], adapter: str = "default") -> None:
    """Sets A and B of every LoRA over a quantised weight. read: the checkpoint's dense tensor of a name."""
    base_model = peft_model.get_base_model()
    for name, layer in base_model.named_modules():
        if adapter not in getattr(layer, "lora_A", {}):
            continue
        base: Any = base_layer_of(layer)
        if storage_of(base) == "dense":
            continue
        if layer.lora_variant:
            raise OptionError("get_peft_model", [f"loftq_config repairs plain LoRA only; {name} is another variant"])
        quantized = dequantize(base, torch.float32)
        error = read(f"{name}.weight").to(quantized.device, torch.float32) - quantized
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        rank = layer.r[adapter]
        root = s[:rank].sqrt()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        a.data.copy_(root[:, None] * vh[:rank])
        b.data.copy_(u[:, :rank] * root / layer.scaling[adapter])
