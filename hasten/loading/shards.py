"""Reads the headers of safetensors files, to refuse a checkpoint that is damaged or does not fit before any weight is
read.

Format: 8 bytes little-endian length N, N bytes of JSON {tensor: {dtype, shape, data_offsets}}, then the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from hasten.errors import CheckpointError
from hasten.weights import formats

LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it. dtype in the format's names: "BF16", "F32", "U8", ..."""

    shape: tuple[int, ...]
    dtype: str
    file: str


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one safetensors file. Raises CheckpointError if it is corrupt or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{path.name} is not a safetensors file, or is truncated ({size} bytes)")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        stored = {n: StoredTensor(tuple(e["shape"]), e["dtype"], path.name) for n, e in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path.name} has an unreadable header ({error})") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{path.name} has {size} bytes, its header describes {8 + length + end}")
    return stored


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


def check_tensors(stored: Mapping[str, StoredTensor], model: PreTrainedModel, folder: Path) -> None:
    """Raises one CheckpointError naming every tensor that `model` (on the meta device) needs and that is missing or has
    another shape.

    Tensors that the model does not need are ignored, as by transformers. Where transformers renames or fuses tensors
    while loading, its own report is checked after loading instead.
    """
    if is_converted(model):
        return
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    bad: list[str] = []
    for name, expected in model.state_dict().items():
        key = find(name, stored, tied, model.base_model_prefix)
        entry = stored[key] if key is not None else None
        if entry is None:
            bad.append(f"{name} {tuple(expected.shape)} is missing")
        elif entry.shape != tuple(expected.shape) and not _packed(name, stored, entry, expected.numel()):
            bad.append(f"{name} is {entry.shape} in {entry.file}, the model's is {tuple(expected.shape)}")
    if bad:
        asked = f"The checkpoint in {folder} does not hold the {type(model).__name__} that its config.json describes"
        raise CheckpointError(_listed(asked, bad, "Use the config.json that belongs to these weights"))


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
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        mapped = dict(index["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not readable ({type(error).__name__}: {error}). Download it again") from error
    outside = [name for name in mapped.values() if not isinstance(name, str) or Path(name).name != name]
    if outside or not mapped:
        raise CheckpointError(
            f"{path} lists no shard, or files outside of its folder: {outside[:3]}. Download it again"
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
