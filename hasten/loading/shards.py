"""Reads the headers of safetensors files, to refuse a checkpoint that is damaged or does not fit before any weight is
read.

Format: 8 bytes little-endian length N, N bytes of JSON {tensor: {dtype, shape, data_offsets}}, then the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from hasten.errors import CheckpointError
from hasten.json_file import JsonError, parse_object, read_object, shown
from hasten.weights import formats

LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
METADATA = "__metadata__"
BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""The format's dtypes -> bits of a value."""
FLOATS = (
    "BF16",
    "F16",
    "F32",
    "F64",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it. dtype in the format's names: "BF16", "F32", "U8", ..."""

    shape: tuple[int, ...]
    dtype: str
    file: str


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one safetensors file. Raises CheckpointError if it is corrupt or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise CheckpointError(f"{path.name} is not a safetensors file, or is truncated ({size} bytes)")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror or error})") from error
    try:
        header = parse_object(raw.decode("utf-8"))
        end = _check_layout(header)
    except (UnicodeDecodeError, JsonError) as error:
        raise CheckpointError(f"{path.name} has an unreadable header ({shown(error)})") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{path.name} has {size} bytes, its header describes {8 + length + end}")
    return {
        name: StoredTensor(tuple(entry["shape"]), entry["dtype"], path.name)
        for name, entry in header.items()
        if name != METADATA
    }


def _check_layout(header: Mapping[str, Any]) -> int:
    """Returns the bytes that a header describes. Raises JsonError for a tensor without dtype, shape and offsets that
    agree, and for tensors that overlap or leave a gap."""
    spans = []
    for name, entry in header.items():
        if name == METADATA:
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise JsonError(f"{shown(name)} has no dtype, shape and data_offsets")
        bits, shape, offsets = BITS.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        if bits is None:
            raise JsonError(f"{shown(name)} has the dtype {shown(entry['dtype'])}, which the format does not have")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise JsonError(f"{shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}")
        if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * bits:
            raise JsonError(f"{shown(name)} has shape {shown(shape)} and {offsets[1] - offsets[0]} bytes")
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for begin, after, name in sorted(spans):
        if begin != end:
            raise JsonError(f"{shown(name)} begins at {begin}, and the tensor before it ends at {end}")
        end = after
    return end


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def read_checkpoint(folder: Path, variant: str | None = None) -> dict[str, StoredTensor]:
    """Returns all tensors of a checkpoint folder, sharded or not. Raises one CheckpointError that names every bad
    file."""
    middle = f".{variant}" if variant else ""
    single = folder / f"model{middle}.safetensors"
    index = folder / f"model.safetensors.index{middle}.json"
    if single.is_file():
        files, mapped = [single.name], None
    elif index.is_file():
        mapped = _read_index(index)
        files = sorted(set(mapped.values()))
    else:
        raise CheckpointError(_no_weights(folder, single.name, index.name))
    found: dict[str, StoredTensor] = {}
    bad: list[str] = []
    for name in files:
        if not (folder / name).is_file():
            bad.append(f"{name} is missing")
            continue
        try:
            found.update(read_header(folder / name))
        except CheckpointError as error:
            bad.append(str(error))
    if not bad and mapped is not None:
        lost = [f"{t} should be in {f}" for t, f in mapped.items() if t not in found or found[t].file != f]
        bad += [f"{line}, says the index" for line in lost]
    if bad:
        raise CheckpointError(_listed(f"The checkpoint in {folder} is incomplete", bad, "Download or save it again"))
    return found


def check_tensors(stored: Mapping[str, StoredTensor], model: PreTrainedModel, folder: Path) -> list[str]:
    """Raises one CheckpointError naming every tensor that does not fit `model` (on the meta device): missing, of another
    shape, integers for floats, or of a layer that the model does not have.

    Returns notes: other tensors that the model does not need, which are ignored as by transformers. Where transformers
    renames or fuses tensors while loading, its own report is checked after loading instead.
    """
    if is_converted(model):
        return []
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    bad: list[str] = []
    used: set[str] = set()
    quantised = getattr(model.config, "quantization_config", None) is not None
    for name, expected in model.state_dict().items():
        key = find(name, stored, tied, model.base_model_prefix)
        entry = stored[key] if key is not None else None
        if key is None or entry is None:
            bad.append(f"{name} {tuple(expected.shape)} is missing")
            continue
        used.add(key)
        if entry.shape != tuple(expected.shape):
            if _packed(key, stored, entry, expected.numel()):
                continue
            bad.append(f"{name} is {entry.shape} in {entry.file}, the model's is {tuple(expected.shape)}")
        elif expected.is_floating_point() and entry.dtype not in FLOATS and not quantised:
            bad.append(f"{name} is {entry.dtype} in {entry.file}, the model's is a float")
    left = [name for name in stored if not _is_used(name, used)]
    surplus = [name for name in left if _beyond_the_model(name, model)]
    bad += [f"{name} is in {stored[name].file}, and the model has no such layer" for name in surplus]
    if bad:
        asked = f"The checkpoint in {folder} does not hold the {type(model).__name__} that its config.json describes"
        raise CheckpointError(_listed(asked, bad, "Use the config.json that belongs to these weights"))
    if not left or quantised:
        return []
    return [f"weights: {len(left)} tensors of the checkpoint are not used by the model: {', '.join(left[:5])}"]


def _is_used(name: str, used: set[str]) -> bool:
    """Returns whether a tensor is one that was read, or belongs to one, as ".absmax" to the codes before it."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in used for count in range(len(parts), 0, -1))


def _beyond_the_model(name: str, model: PreTrainedModel) -> bool:
    """Returns whether the tensor belongs to an item of one of the model's lists of modules, beyond the list's end.

    Layers for multi-token prediction, which a causal LM does not have, are listed by the config or by the model class.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, name) for pattern in patterns):
        return False
    config = model.config.get_text_config()
    extra = getattr(config, "num_nextn_predict_layers", None) or getattr(config, "num_mtp_layers", None) or 0
    parts = name.split(".")
    prefix = model.base_model_prefix
    for place, part in enumerate(parts):
        if not part.isdecimal():
            continue
        path = ".".join(parts[:place])
        for candidate in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
            found = _module(model, candidate)
            if isinstance(found, nn.ModuleList) and int(part) >= len(found) + extra:
                return True
    return False


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def is_converted(model: PreTrainedModel) -> bool:
    """Returns whether transformers renames or fuses checkpoint tensors into this model's, so that names need not
    agree."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def find(name: str, stored: Mapping[str, StoredTensor], tied: Mapping[str, str], prefix: str) -> str | None:
    """Returns the key under which a checkpoint holds the model's tensor `name`, or one that is tied to it.

    tied: {tensor: the one whose weight it shares}. prefix: the backbone's name in the model; transformers reads a
    backbone's checkpoint into a causal LM and vice versa.
    """
    sharing = [name, *([tied[name]] if name in tied else []), *(t for t, source in tied.items() if source == name)]
    names = [n for one in sharing for n in (one, one.removeprefix(f"{prefix}."), f"{prefix}.{one}")]
    return next((n for n in names if n in stored), None)


def _packed(name: str, stored: Mapping[str, StoredTensor], entry: StoredTensor, count: int) -> bool:
    """Returns whether the tensor can be a quantised format's codes of `count` weights, whose shape is not the
    weight's."""
    suffixes = [key.removeprefix(name) for key in stored if key.startswith(name)]
    return any(one.fits(entry.shape, entry.dtype, count, suffixes) for one in formats.FORMATS)


def _read_index(path: Path) -> dict[str, str]:
    mapped = read_object(path, CheckpointError).get("weight_map")
    if not isinstance(mapped, dict):
        raise CheckpointError(f"{path} is not readable: it has no weight_map of tensors and files. Download it again")
    outside = [name for name in mapped.values() if not isinstance(name, str) or Path(name).name != name]
    if outside or not mapped:
        raise CheckpointError(
            f"{path} lists no shard, or files outside of its folder: {shown(outside[:3])}. Download it again"
        )
    return mapped


def _no_weights(folder: Path, single: str, index: str) -> str:
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{folder} has its weights only as pickle ({', '.join(pickles[:3])}), which can run code when it is read. "
            "Use a safetensors copy, or pass use_safetensors=False if you trust where it comes from"
        )
    return f"{folder} has neither {single} nor {index}. Pass a folder with the weights in it"


def _listed(what: str, bad: list[str], instead: str, most: int = 20) -> str:
    lines = [f"  - {line}" for line in bad[:most]]
    if len(bad) > most:
        lines.append(f"  - and {len(bad) - most} more")
    return "\n".join([f"{what} ({len(bad)} problems). {instead}.", *lines])
