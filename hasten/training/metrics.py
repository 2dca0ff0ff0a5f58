"""What a training run tells about itself: one row per logged step, counted from the batches that the model was given."""

import json
import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

IGNORED = -100


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl, for the optimizer steps since the line before.

    loss: nats per learned token. grad_norm: before clipping. tokens: real ones, padding left out. learned_tokens: those
    whose label counts. masked_percent: share of tokens that are not learned. total_tokens: since step 1, resumed runs
    included. peak_memory_bytes: of the GPU since the start, or of the process where there is none. eta_seconds: to the
    last step, at this run's mean pace.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    learned_tokens: int
    masked_percent: float
    total_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    eta_seconds: float


class TokenCounter:
    """A forward pre-hook that counts the tokens of training batches. Sums stay on the device until `take`."""

    def __init__(self) -> None:
        self._tokens: int | torch.Tensor = 0
        self._learned: int | torch.Tensor = 0

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        labels = kwargs.get("labels")
        if labels is None or not module.training:
            return
        mask = kwargs.get("attention_mask")
        self._tokens = self._tokens + (labels.numel() if mask is None else mask.sum())
        self._learned = self._learned + (labels[:, 1:] != IGNORED).sum()  # nothing predicts the first token

    def take(self) -> tuple[int, int]:
        """Tokens and learned tokens since the last call."""
        taken = int(self._tokens), int(self._learned)
        self._tokens = self._learned = 0
        return taken


@contextmanager
def counting(model: torch.nn.Module) -> Iterator[TokenCounter]:
    """Counts what `model` is given in training mode, until the block ends."""
    counter = TokenCounter()
    handle = model.register_forward_pre_hook(counter, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()


class MetricsFile:
    """metrics.jsonl: one JSON object a line, written out at once, so a killed run leaves every finished step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """What is written so far. Training rows have `loss`, evaluation rows `eval_loss`; both have `step`."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops rows after `step`, which a resumed run will make again, and returns those that are left."""
        kept = [row for row in self.rows() if row["step"] <= step] if step else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        fresh.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        fresh.replace(self.path)
        return kept

    def add(self, row: StepMetrics | Mapping[str, Any]) -> None:
        """Appends one row."""
        values = asdict(row) if isinstance(row, StepMetrics) else dict(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(values))


def losses(rows: Sequence[Mapping[str, Any]], name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of every row that has a finite `name`."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors took on a GPU, or that this process took where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
