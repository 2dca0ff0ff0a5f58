"""LoftQ (Li et al. 2023, arXiv:2310.08659), one iteration: initialises LoRA as the best low-rank fit of the
quantisation error.

With Q the model's quantised weight and W the checkpoint's: scale * B @ A is the rank-r truncated SVD of W - Q. Q is not
changed, so the same checkpoint and adapter give the same model again.
"""

from collections.abc import Callable
from typing import Any

import torch

from hasten.errors import OptionError
from hasten.weights import base_layer_of, dequantize, formats


def problems(model: Any, config: dict[str, Any]) -> list[str]:
    """Returns why LoftQ cannot run on `model` as asked; empty = it can."""
    found = []
    unknown = sorted(set(config) - {"loftq_bits", "loftq_iter"})
    if unknown:
        found.append(f"loftq_config has {unknown}; its fields are loftq_bits and loftq_iter")
    if config.get("loftq_iter", 1) != 1:
        found.append(
            f"loftq_iter={config['loftq_iter']}: further iterations would change the quantised base, so that loading the "
            "checkpoint again would give another model; use 1"
        )
    linears = [formats.format_of(m) for m in model.modules() if "Linear" in type(m).__name__]
    bits = {one.bits for one in linears if not one.exact}
    if not bits:
        ways = " or ".join(f"{name}=True" for name in formats.load_arguments(quantized=True))
        found.append(
            f"loftq_config corrects the error of a quantised base, and this base is not quantised; load with {ways}"
        )
    elif config.get("loftq_bits", 4) not in bits:
        found.append(
            f"loftq_bits={config.get('loftq_bits', 4)}, but the base has {sorted(bits)} bits; pass that number"
        )
    return found


def initialise(peft_model: Any, read: Callable[[str], torch.Tensor], adapter: str = "default") -> None:
    """Sets A and B of every LoRA over a quantised weight. read: the checkpoint's dense tensor of a name."""
    base_model = peft_model.get_base_model()
    for name, layer in base_model.named_modules():
        if adapter not in getattr(layer, "lora_A", {}):
            continue
        base: Any = base_layer_of(layer)
        if formats.format_of(base).exact:
            continue
        if layer.lora_variant:
            raise OptionError(
                "get_peft_model",
                [f"loftq_config initialises only plain LoRA; {name} has another variant; leave loftq_config out"],
            )
        quantized = dequantize(base, torch.float32)
        error = read(f"{name}.weight").to(quantized.device, torch.float32) - quantized
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        rank = layer.r[adapter]
        root = s[:rank].sqrt()
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        a.data.copy_(root[:, None] * vh[:rank])
        b.data.copy_(u[:, :rank] * root / layer.scaling[adapter])
