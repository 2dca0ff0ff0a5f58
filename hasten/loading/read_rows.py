"""Quantises a dense safetensors checkpoint into host memory a few rows at a time.

transformers' loader quantises one whole tensor after the other. On a CPU bitsandbytes needs seven times a tensor's bytes
meanwhile, and what that leaves behind in the allocator adds up to more than the result. Here no dense matrix is ever
whole in memory. Blocks (NF4) and rows (int8) are quantised independently, so the outcome is the same to the bit.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from hasten.errors import CheckpointError
from hasten.loading.quantization import NF4_BLOCK
from hasten.loading.shards import StoredTensor, find

CHUNK = 2**16  # weights at a time: what that needs is small enough for the allocator to use it again and again
FLOATS = ("BF16", "F16", "F32")


def read_rows(
    folder: Path,
    config: Any,
    attention: str | None,
    dtype: torch.dtype,
    settings: Any,
    stored: Mapping[str, StoredTensor],
) -> PreTrainedModel:
    """The quantised model on the CPU, in evaluation mode, as transformers' loader would make it.

    attention: attn_implementation, None = transformers' choice. settings: a BitsAndBytesConfig. stored: the headers of
    the safetensors in `folder`. Raises CheckpointError where they leave a tensor without values.
    """
    chosen = {"attn_implementation": attention} if attention is not None else {}
    with init_empty_weights(include_buffers=False):  # buffers that no checkpoint holds get their values here
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen)
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.validate_environment(device_map={"": "cpu"})
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
    tied: dict[str, str] = model.all_tied_weights_keys
    prefix = model.base_model_prefix
    with _Shards(folder) as shards, torch.no_grad():
        for name, empty in model.state_dict(keep_vars=True).items():
            key = find(name, stored, tied, prefix)
            if key is not None and (name not in tied or find(tied[name], stored, {}, prefix) is None):
                _fill(model, name, empty, shards.slice(stored[key].file, key))
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise CheckpointError(f"{folder} has no values for {', '.join(left[:5])}. Use the config.json of these weights")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()


class _Shards:
    """The shard files, one open at a time: a mapped file's pages go back to the system when it is closed."""

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
        """A tensor of a shard, of which nothing is read before it is indexed."""
        if file != self.name:
            self._close()
            self.file, self.name = safe_open(self.folder / file, framework="pt"), file
        return self.file.get_slice(key)


def _fill(model: nn.Module, name: str, old: torch.Tensor, rows: Any) -> None:
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    kind = type(old).__name__
    if kind == "Params4bit":
        module.weight = _nf4(module, rows)
    elif kind == "Int8Params":
        module.weight = _int8(old, rows)
    else:
        value = rows[...].to(old.dtype, copy=True)
        if isinstance(old, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value)


def _chunks(rows: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, some rows) of a stored matrix, in its own dtype."""
    count, width = rows.get_shape()
    step = max(1, CHUNK // width)
    for start in range(0, count, step):
        yield start, rows[start : start + step].contiguous()


def _nf4(module: Any, rows: Any) -> Any:
    """bitsandbytes' parameter of a matrix whose rows are whole blocks: codes two in a byte, double-quantised scales."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise

    count, width = rows.get_shape()
    codes = torch.empty(count * width // 2, 1, dtype=torch.uint8)
    scales = torch.empty(count * width // NF4_BLOCK)
    state: Any = None
    for start, dense in _chunks(rows):
        packed, state = quantize_4bit(dense, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
        codes[start * width // 2 :][: packed.shape[0]] = packed
        scales[start * width // NF4_BLOCK :][: state.absmax.shape[0]] = state.absmax
    offset = scales.mean()
    scales, outer = quantize_blockwise(scales - offset, blocksize=256)
    whole = QuantState(
        absmax=scales,
        shape=torch.Size((count, width)),
        code=state.code,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=state.dtype,
        offset=offset,
        state2=outer,
    )
    return bnb.nn.Params4bit.from_prequantized(codes, whole.as_dict(packed=True), device="cpu", module=module)


def _int8(old: Any, rows: Any) -> Any:
    """bitsandbytes' parameter of a matrix with one scale per row."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import int8_vectorwise_quant

    codes = torch.empty(rows.get_shape(), dtype=torch.int8)
    scales = torch.empty(codes.shape[0])
    for start, dense in _chunks(rows):
        part, scale, _ = int8_vectorwise_quant(dense.to(torch.float16))
        codes[start : start + part.shape[0]] = part
        scales[start : start + part.shape[0]] = scale
    make: Any = bnb.nn.Int8Params
    return make(codes, requires_grad=False, has_fp16_weights=old.has_fp16_weights, CB=codes, SCB=scales)
