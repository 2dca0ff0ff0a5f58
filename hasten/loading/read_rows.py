"""Reads a safetensors checkpoint into CPU memory tensor by tensor, quantising dense weights some output channels at a
time.

transformers' loader quantises one whole tensor after the other. On a CPU bitsandbytes needs seven times a tensor's
bytes for that, and the allocator's fragmentation afterwards takes more memory than the result. Here no dense matrix is
ever in memory as a whole. Formats quantise blocks or output channels independently, so the result is bit-exact.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from hasten.errors import CheckpointError
from hasten.loading.config_file import read_generation_config
from hasten.loading.quantization import Storage
from hasten.loading.shards import StoredTensor, find
from hasten.weights import formats
from hasten.weights.finite import CheckedMatrix, described, nonfinite
from hasten.weights.formats import WeightFormat
from hasten.weights.formats.base import WidenedMatrix

FLOATS = ("BF16", "F16", "F32")


def read_rows(
    folder: Path,
    config: Any,
    attention: str | None,
    dtype: torch.dtype,
    storage: Storage,
    stored: Mapping[str, StoredTensor],
) -> PreTrainedModel:
    """Returns the quantised model on the CPU, in evaluation mode, as transformers' loader would return it.

    attention: attn_implementation, None = transformers' choice. storage: with a transformers config, or with a format
    of hasten's own. stored: the headers of the safetensors in `folder`. Raises CheckpointError where they have no
    values for a tensor.
    """
    chosen = {"attn_implementation": attention} if attention is not None else {}
    with init_empty_weights(include_buffers=False):  # buffers that no checkpoint holds get their values here
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    quantizer: Any = None
    if storage.own is not None:
        convert_linears(model, storage, lambda own, linear: own.empty(linear))
    else:
        quantizer = AutoHfQuantizer.from_config(storage.settings, pre_quantized=False)
        quantizer.validate_environment(device_map={"": "cpu"})
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
    with _Shards(folder) as shards, torch.no_grad():
        refuse_nonfinite(folder, _read_tensors(model, shards, stored, None if storage.stored else dtype), dtype)
    model.tie_weights()
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if left:
        raise CheckpointError(f"{folder} has no values for {', '.join(left[:5])}. Use the config.json of these weights")
    if (generation := read_generation_config(folder)) is not None:
        model.generation_config = generation
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    if storage.own is not None:
        storage.own.mark(model)
    return model.eval()


def convert_linears(model: nn.Module, storage: Storage, make: Callable[[WeightFormat, nn.Linear], nn.Module]) -> None:
    """Replaces every dense Linear that should not stay dense by `make(storage.own, linear)`."""
    assert storage.own is not None
    for name, module in list(model.named_modules()):
        stays = any(name == kept or name.startswith(f"{kept}.") for kept in storage.kept_dense)
        if type(module) is nn.Linear and not stays:
            model.set_submodule(name, make(storage.own, module))


def _read_tensors(
    model: Any, shards: "_Shards", stored: Mapping[str, StoredTensor], quantise_for: torch.dtype | None
) -> dict[str, int]:
    """Reads every tensor into the model; returns {name: NaN and infinite values} where there are some. quantise_for: dense
    weights are quantised for a model of this dtype; None = the checkpoint holds the model's tensors under its own names."""
    tied: dict[str, str] = model.all_tied_weights_keys
    bad: dict[str, int] = {}
    for name, empty in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        key = find(name, stored, tied, model.base_model_prefix)
        if key is None or (name in tied and find(tied[name], stored, {}, model.base_model_prefix) is not None):
            continue
        matrix = shards.slice(stored[key].file, key)
        found = formats.find_format(module) if leaf == "weight" and isinstance(module, nn.Linear) else None
        if found is not None and not found.exact and quantise_for is not None:
            checked = CheckedMatrix(WidenedMatrix(matrix, quantise_for))
            found.fill(module, checked)
            bad[name] = checked.count
            continue
        value = matrix[...].to(empty.dtype, copy=True)
        bad[name] = nonfinite(value)
        if isinstance(empty, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value)
    return {name: count for name, count in bad.items() if count}


def refuse_nonfinite(folder: Path, found: Mapping[str, int], dtype: torch.dtype) -> None:
    """Raises CheckpointError that counts and names weights which are NaN or infinite, in the file or in `dtype`."""
    if found:
        raise CheckpointError(
            f"The weights in {folder}, loaded as {str(dtype).removeprefix('torch.')}: {described(found)}. Download them "
            "again, use an earlier checkpoint of the run that wrote them, or pass dtype=torch.bfloat16 if they only "
            "overflow"
        )


class _Shards:
    """The shard files, one open at a time: closing a memory-mapped file returns its pages to the system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = ""
        self.file: Any = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.file is not None:
            self.file.__exit__(None, None, None)
            self.file = None

    def slice(self, file: str, key: str) -> Any:
        """Returns a tensor of a shard; it is read only when it is indexed."""
        if file != self.name:
            self._close()
            self.file, self.name = safe_open(self.folder / file, framework="pt"), file
        return self.file.get_slice(key)
