"""Writes tensors into safetensors shards, one shard in memory at a time, each synced to the disk.

Format: https://huggingface.co/docs/safetensors (an 8-byte little-endian header length, a JSON header, raw bytes).
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hasten.errors import ExportError
from hasten.units import parse_bytes
from hasten.weights.finite import described, nonfinite_names

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def parse_size(size: int | str) -> int:
    """Parses `max_shard_size` as `units.parse_bytes` does. Raises ExportError."""
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise ExportError(f"max_shard_size: {error}") from error


class ShardWriter:
    """Collects tensors with `add` and writes a shard whenever the next tensor would exceed `max_bytes`; `finish` gives
    the files their names.

    With one shard the file is `{stem}.safetensors`, else `{stem}-00001-of-0000N.safetensors` with an index that lists
    every tensor once.
    """

    def __init__(self, folder: Path, max_bytes: int, stem: str = "model") -> None:
        self.folder, self.max_bytes, self.stem = folder, max_bytes, stem
        self.total_bytes = 0
        self.parameters = 0
        self._held: dict[str, torch.Tensor] = {}
        self._written: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps the tensor until its shard is written."""
        size = tensor.numel() * tensor.element_size()
        if self._held and sum(t.numel() * t.element_size() for t in self._held.values()) + size > self.max_bytes:
            self._flush()
        self._held[name] = tensor
        self.total_bytes += size

    def finish(self) -> None:
        """Writes the rest, gives the files their names, and writes the index if there are several."""
        if self._held or not self._written:
            self._flush()
        if len(self._written) == 1:
            self._written[0][0].rename(self.folder / f"{self.stem}.safetensors")
            return
        weight_map = {}
        for number, (path, names) in enumerate(self._written, 1):
            final = f"{self.stem}-{number:05d}-of-{len(self._written):05d}.safetensors"
            path.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / f"{self.stem}.safetensors.index.json", index)

    def _flush(self) -> None:
        path = self.folder / f"{self.stem}-{len(self._written) + 1:05d}.part"
        write_safetensors(path, self._held)
        self._written.append((path, list(self._held)))
        self._held = {}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one file straight from the tensors' memory, and waits for the disk. Widest dtypes first, as loaders
    expect. Raises ExportError for NaN and infinity."""
    require_finite(tensors)
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ExportError, with counts and names, where a weight is NaN or infinite: quantised, it would become a
    number."""
    if found := nonfinite_names(tensors.items()):
        raise ExportError(
            f"{described(found)}, so the model is not written. The training run diverged or the base is damaged; use an "
            "earlier checkpoint, or pass dtype=torch.bfloat16 or torch.float32 where the values only overflow"
        )


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON and waits for the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
