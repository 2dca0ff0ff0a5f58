"""A tiny model of any causal-LM `model_type` that transformers knows, from its default config with sizes made small."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from hasten.testing.tiny_sizes import OVERRIDES, SIZES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 40_000_000

FOREIGN_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
"""What transformers, PEFT and torch raise where a tiny model cannot be made or run."""


class NotBuildable(Exception):
    """transformers makes no tiny model of this type, for the reason that the message gives."""


def tiny_config_of(model_type: str) -> PreTrainedConfig:
    """The type's default config with small sizes. Raises what the config's own checks raise."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_shrunk(kind(), OVERRIDES.get(model_type, {})))


def _shrunk(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make this config small, nested ones as dicts."""
    present = config.__dict__
    special = {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {**{name: value for name, value in SIZES.items() if present.get(name) is not None}, **special}
    for name, value in present.items():
        if isinstance(value, PreTrainedConfig):
            nested = changes.get(name, {})
            sizes[name] = _shrunk(value, nested) if isinstance(nested, dict) else nested
    return {**sizes, **{name: value for name, value in changes.items() if not isinstance(sizes.get(name), dict)}}


def tiny_model_of(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A stock model of random fp32 weights, norms included, in evaluation mode. Raises NotBuildable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = tiny_config_of(model_type)
            with torch.device("meta"):
                parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if parameters > LARGEST:
                raise NotBuildable(f"{parameters:,} parameters with the smallest sizes")
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (*FOREIGN_ERRORS, StrictDataclassError) as error:
            raise NotBuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}") from error
        _amplify(model)
    return model.eval()


@torch.no_grad()
def _amplify(model: Any) -> None:
    """Scales Linears up and gives norms noise, until a wrong activation or a missing factor changes the output measurably."""
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            module.weight.mul_(5.0)
    head.weight.mul_(8.0)
