"""Reads the weights: through transformers' own loader, or row by row where they are quantised into host memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hasten.errors import CheckpointError
from hasten.loading.device import is_all_cpu
from hasten.loading.read_rows import FLOATS, read_rows
from hasten.loading.shards import StoredTensor, is_converted
from hasten.loading.vocabulary import seeded
from hasten.options import MODEL_ARGUMENTS, LoadOptions


@dataclass(frozen=True)
class Reading:
    """What the weights are read into: a config as it should be, a dtype, a place, and how they are quantised (or None).

    empty: the model on the meta device. stored: the headers of its safetensors, none for pickle.
    """

    folder: Path
    config: Any
    dtype: torch.dtype
    device_map: Any
    quantization: Any
    options: LoadOptions
    empty: PreTrainedModel
    stored: Mapping[str, StoredTensor]

    @property
    def goes_by_rows(self) -> bool:
        """Whether weights are quantised on the CPU, from a dense checkpoint that transformers loads name by name."""
        model = self.empty
        simple = not set(self.options.extra) & {"key_mapping", "generation_config", "quantization_config"}
        dense = bool(self.stored) and all(entry.dtype in FLOATS for entry in self.stored.values())
        on_cpu = is_all_cpu(self.device_map) and "disk" not in self.device_map.values()
        plain = type(model).__module__.startswith("transformers.") and not is_converted(model)
        fp32 = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
        return self.quantization is not None and simple and dense and on_cpu and plain and not fp32


def read_model(reading: Reading) -> PreTrainedModel:
    """The model in evaluation mode. Raises CheckpointError where the checkpoint left a weight without its values."""
    with seeded(reading.options.random_state):
        if reading.goes_by_rows:
            attention = reading.options.attn_implementation
            model = read_rows(
                reading.folder, reading.config, attention, reading.dtype, reading.quantization, reading.stored
            )
        else:
            model = _read_whole(reading)
    _keep_codes(model)
    return model


def _read_whole(reading: Reading) -> PreTrainedModel:
    """transformers' loader, which takes one tensor after the other from the mapped shards."""
    options = reading.options
    arguments = {n: v for n, v in options.extra.items() if n in MODEL_ARGUMENTS - {"config", "quantization_config"}}
    if reading.quantization is not None:
        arguments["quantization_config"] = reading.quantization
    if options.attn_implementation is not None:
        arguments["attn_implementation"] = options.attn_implementation
    try:
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
