"""Compares tensors by relative error in the Frobenius norm, against a limit; the error names every failed
comparison."""

from dataclasses import dataclass, field

import torch

from hasten.errors import AccuracyError


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Computes ||ours - reference|| / ||reference|| in fp64; inf if the shapes differ or a value is not finite."""
    if ours.shape != reference.shape:
        return float("inf")
    difference = (ours.detach().double() - reference.detach().double()).norm()
    scale = reference.detach().double().norm()
    error = float(difference / scale) if scale > 0 else float(difference)
    return error if error == error else float("inf")


@dataclass
class Comparison:
    """Collects errors and their limits. `check()` raises AccuracyError naming each that is over its limit."""

    title: str
    rows: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, name: str, ours: torch.Tensor, reference: torch.Tensor, limit: float) -> None:
        self.rows.append((name, relative_error(ours, reference), limit))

    def worst(self, prefix: str = "") -> float:
        """Returns the largest error among the rows whose name starts with `prefix`."""
        return max((error for name, error, _ in self.rows if name.startswith(prefix)), default=0.0)

    def check(self) -> "Comparison":
        failed = [
            f"{name}: relative error {error:.3g}, limit {limit:.3g}"
            for name, error, limit in self.rows
            if error > limit
        ]
        if failed:
            raise AccuracyError(
                f"{self.title}: {len(failed)} of {len(self.rows)} comparisons failed\n  " + "\n  ".join(failed)
            )
        return self
