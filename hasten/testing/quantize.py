"""NF4 in memory, for tests: the Linears of a model replaced by bitsandbytes' 4-bit ones, the head left dense."""

from typing import Any

from torch import nn

from hasten.errors import MissingExtraError


def quantize_linears(model: Any) -> Any:
    """Replaces every Linear but `lm_head` by a Linear4bit (NF4, double quantisation) in place, and returns the model."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingExtraError("quantizing a tiny model", "bitsandbytes", "train") from error
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        dtype = module.weight.dtype
        low = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, dtype, True, "nf4", device="meta"
        )
        make: Any = bnb.nn.Params4bit
        packed = make(module.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        low.weight = packed.to(module.weight.device)  # moving is what quantises
        low.bias = module.bias
        model.set_submodule(name, low)
    model.is_loaded_in_4bit = True
    return model
