"""Reads the weights, through transformers' own loader, which takes tensors from the mapped shards one after the other.

On-the-fly quantisation there is sequential, so host memory holds the result and one dense tensor at a time; a test
measures it (tests/loading/test_memory.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hasten.errors import CheckpointError
from hasten.loading.vocabulary import seeded
from hasten.option_problems import MODEL_ARGUMENTS
from hasten.options import LoadOptions


@dataclass(frozen=True)
class Reading:
    """What the weights are read into: a config as it should be, a dtype, a place, and how they are quantised (or None)."""

    folder: Path
    config: Any
    dtype: torch.dtype
    device_map: Any
    quantization: Any
    options: LoadOptions


def read_model(reading: Reading) -> PreTrainedModel:
    """The model in evaluation mode. Raises CheckpointError where the checkpoint left a weight without its values."""
    options = reading.options
    arguments = {n: v for n, v in options.extra.items() if n in MODEL_ARGUMENTS - {"config", "quantization_config"}}
    if reading.quantization is not None:
        arguments["quantization_config"] = reading.quantization
    if options.attn_implementation is not None:
        arguments["attn_implementation"] = options.attn_implementation
    try:
        with seeded(options.random_state):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                reading.folder,
                config=reading.config,
                dtype=reading.dtype,
                device_map=reading.device_map,
                use_safetensors=options.use_safetensors is not False,
                trust_remote_code=options.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **arguments,
            )
    except (OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(f"The weights in {reading.folder} could not be read ({error})") from error
    model, info = loaded
    _keep_codes(model)
    missing = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        raise CheckpointError(
            f"The checkpoint in {reading.folder} has no usable values for {len(missing)} tensors, among them "
            f"{', '.join(missing[:5])}. Use the config.json that belongs to these weights"
        )
    return model


def _keep_codes(model: PreTrainedModel) -> None:
    """Has bitsandbytes leave 4-bit weights as they are read.

    On CPUs with AVX512-BF16 its first forward in evaluation mode repacks the codes and rounds their scales to bf16: one
    `generate` would change the weights that are trained on and merged, and shapes off a multiple of 64 fail.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
