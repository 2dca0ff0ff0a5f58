"""Counts NaN and infinity in weights: one pass of a minimum and maximum where there are none."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hasten.weights.formats.base import Matrix


def is_checked(tensor: torch.Tensor) -> bool:
    """Returns whether NaN and infinity are looked for: in floating dtypes of 16 bits and more, except on the meta
    device."""
    return tensor.is_floating_point() and tensor.itemsize >= 2 and not tensor.is_meta and tensor.numel() > 0


def nonfinite(tensor: torch.Tensor) -> int:
    """Returns how many values are NaN or infinite."""
    return next(iter(nonfinite_names([("", tensor)]).values()), 0)


def nonfinite_names(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Returns {name: count} of the tensors that hold NaN or infinity, in `dtype`. Waits for each device once if none
    does.

    Minimum and maximum propagate NaN and cannot overflow, and are twenty times as fast on a CPU as `isfinite` per value,
    which only counts in the tensors that the former find.
    """
    checked = [(name, tensor.detach()) for name, tensor in tensors if is_checked(tensor)]
    ends: dict[torch.device, list[torch.Tensor]] = {}
    for _, tensor in checked:
        ends.setdefault(tensor.device, []).append(torch.stack(torch.aminmax(tensor)).to(dtype))
    fine = {device: iter(torch.isfinite(torch.stack(found)).all(dim=1).tolist()) for device, found in ends.items()}
    suspect = [(name, tensor) for name, tensor in checked if not next(fine[tensor.device])]
    return {name: int((~torch.isfinite(tensor.to(dtype))).sum()) for name, tensor in suspect}


def described(found: Mapping[str, int], most: int = 5) -> str:
    """Returns counts and names as text, such as "3 values in 1 of the tensors (model.norm.weight: 3)"."""
    listed = ", ".join(f"{name}: {count}" for name, count in list(found.items())[:most])
    more = f", and {len(found) - most} more" if len(found) > most else ""
    tensors = f"{len(found)} tensor{'s' if len(found) > 1 else ''}"
    return f"{sum(found.values())} values of {tensors} are NaN or infinite ({listed}{more})"


class CheckedMatrix:
    """A `Matrix` that counts NaN and infinity in the slices that are read from it."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.count = 0

    def get_shape(self) -> Any:
        return self.matrix.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        part = self.matrix[index]
        self.count += nonfinite(part)
        return part
