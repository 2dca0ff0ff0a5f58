"""hasten: fast, lean and exact fine-tuning of Hugging Face causal language models.

Names are resolved when they are first used, so that importing the package is fast and has no side effects.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AccuracyError": "errors",
    "CheckpointError": "errors",
    "ContractError": "errors",
    "DatasetError": "errors",
    "ExportError": "errors",
    "FastCohere2Model": "model",
    "FastCohereModel": "model",
    "FastGemma2Model": "model",
    "FastGemma3Model": "model",
    "FastGemmaModel": "model",
    "FastGraniteModel": "model",
    "FastLanguageModel": "model",
    "FastLlamaModel": "model",
    "FastMistralModel": "model",
    "FastQwen2Model": "model",
    "FastQwen3Model": "model",
    "HastenError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "OptionError": "errors",
    "PatchError": "errors",
    "TokenizerError": "errors",
    "TrainingError": "errors",
    "check_dataset": "data",
    "check_family": "testing",
    "estimate": "estimation",
    "install_as_unsloth": "unsloth_compat",
    "patched": "patching",
    "report": "patching",
    "restore": "patching",
    "sft_config": "training.trainer",
    "stochastic_adamw": "training.optimizers",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hasten.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
