"""Reads the weights: through transformers' loader, or tensor by tensor where hasten quantises them itself
(`read_rows`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hasten.errors import CheckpointError
from hasten.loading.device import is_all_cpu
from hasten.loading.foreign import parsing
from hasten.loading.quantization import Storage
from hasten.loading.read_rows import FLOATS, convert_linears, read_rows, refuse_nonfinite
from hasten.loading.scan import counting_nonfinite
from hasten.loading.shards import StoredTensor, is_converted
from hasten.loading.vocabulary import seeded
from hasten.options import MODEL_ARGUMENTS, LoadOptions
from hasten.weights.finite import nonfinite_names
from hasten.weights.formats import find_format

AGAIN = "Download or save them again, with the config.json that belongs to them"


@dataclass(frozen=True)
class Reading:
    """A checkpoint to read, and the model to read it into.

    config: of the model. storage: how the weights are stored. empty: the model on the meta device.
    stored: the headers of its safetensors, empty for pickle.
    """

    folder: Path
    config: Any
    dtype: torch.dtype
    device_map: Any
    storage: Storage
    options: LoadOptions
    empty: PreTrainedModel
    stored: Mapping[str, StoredTensor]

    @property
    def reads_tensors_itself(self) -> bool:
        """Whether hasten reads the tensors itself: to quantise on the CPU from a dense checkpoint that transformers
        loads name by name, or because only hasten knows the format in which the checkpoint is stored."""
        storage, model = self.storage, self.empty
        if storage.stored:
            return True
        simple = not set(self.options.extra) & {"key_mapping", "generation_config", "quantization_config"}
        dense = bool(self.stored) and all(entry.dtype in FLOATS for entry in self.stored.values())
        on_cpu = is_all_cpu(self.device_map) and "disk" not in self.device_map.values()
        plain = type(model).__module__.startswith("transformers.") and not is_converted(model)
        fp32 = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
        quantises = storage.settings is not None or storage.own is not None
        return quantises and simple and dense and on_cpu and plain and not fp32


def read_model(reading: Reading) -> PreTrainedModel:
    """Returns the model in evaluation mode. Raises CheckpointError where the checkpoint has no values for a weight, and
    for NaN and infinity."""
    with seeded(reading.options.random_state), parsing(f"The weights in {reading.folder}", CheckpointError, AGAIN):
        if reading.reads_tensors_itself:
            attention = reading.options.attn_implementation
            model: Any = read_rows(
                reading.folder, reading.config, attention, reading.dtype, reading.storage, reading.stored
            )
            if reading.storage.stored and not is_all_cpu(reading.device_map):
                model.to(_one_device(reading.device_map))
        else:
            model = _read_whole(reading)
            if reading.storage.own is not None:
                convert_linears(model, reading.storage, lambda own, linear: own.convert(linear))
                reading.storage.own.mark(model)
    for module in model.modules():
        found = find_format(module) if isinstance(module, nn.Linear) else None
        if found is not None:
            found.after_load(module)
    return model


def placement_notes(storage: Storage, device_map: Any) -> list[str]:
    """Says that a checkpoint that only hasten reads is not spread over the GPUs, where a device map asks for that."""
    if not storage.stored or not isinstance(device_map, str) or torch.cuda.device_count() < 2:
        return []
    return [
        f"device: cuda:0, since a checkpoint in this format goes to one device; device_map={device_map!r} spreads others"
    ]


def _one_device(device_map: Any) -> torch.device:
    """Returns the single device of a device map; the first GPU for a map that transformers would spread."""
    places = set(map(str, device_map.values())) if isinstance(device_map, Mapping) else {"cuda:0"}
    if len(places) > 1:
        raise CheckpointError(
            f"device_map names {len(places)} devices, and a checkpoint in a format that only hasten reads can be loaded only onto one: "
            "name one device"
        )
    return torch.device(places.pop())


def _read_whole(reading: Reading) -> PreTrainedModel:
    """Loads through transformers, which reads one tensor after the other from the memory-mapped shards."""
    options = reading.options
    arguments = {n: v for n, v in options.extra.items() if n in MODEL_ARGUMENTS - {"config", "quantization_config"}}
    if reading.storage.settings is not None:
        arguments["quantization_config"] = reading.storage.settings
    if options.attn_implementation is not None:
        arguments["attn_implementation"] = options.attn_implementation
    quantises = reading.storage.settings is not None
    with counting_nonfinite(reading.folder, reading.stored if quantises else {}, reading.dtype) as counted:
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
    model, info = loaded
    missing = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if missing:
        raise CheckpointError(
            f"The checkpoint in {reading.folder} has no values for {len(missing)} tensors of the model, among them "
            f"{', '.join(missing[:5])}. Use the config.json that belongs to these weights"
        )
    refuse_nonfinite(reading.folder, counted() or nonfinite_names(model.named_parameters()), reading.dtype)
    return model
