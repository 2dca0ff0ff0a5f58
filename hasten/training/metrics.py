"""Records the metrics of a training run: one line of metrics.jsonl per logged step, tokens counted from the model's
batches."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.data import IGNORE_INDEX
from hasten.errors import TrainingError


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl, for the optimizer steps since the line before.

    loss: nats per token with a label. grad_norm: before clipping. tokens: without padding. learned_tokens: those with a
    label. masked_percent: of tokens, those without a label. total_tokens: since step 1, resumed runs included.
    peak_memory_bytes: of the GPU since the start, or of the process where there is none. eta_seconds: to the last step,
    at this run's mean step time.
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
    """A forward pre-hook that counts the tokens of training batches. Sums stay on the device until `take`: no sync per
    step."""

    def __init__(self) -> None:
        self._tokens: int | torch.Tensor = 0
        self._learned: int | torch.Tensor = 0

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        labels = kwargs.get("labels")
        if labels is None or not module.training:
            return
        mask = kwargs.get("attention_mask")
        self._tokens = self._tokens + (labels.numel() if mask is None else mask.sum())
        self._learned = self._learned + (labels[:, 1:] != IGNORE_INDEX).sum()  # no position predicts the first token

    def take(self) -> tuple[int, int]:
        """Returns (tokens, tokens with a label) since the last call."""
        taken = int(self._tokens), int(self._learned)
        self._tokens = self._learned = 0
        return taken


@contextmanager
def counting(model: torch.nn.Module) -> Iterator[TokenCounter]:
    """Counts the tokens of the batches that `model` gets in training mode, inside the block."""
    counter = TokenCounter()
    handle = model.register_forward_pre_hook(counter, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each written immediately, so that a killed run keeps all logged
    steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Returns the lines written so far. Training has `loss`, evaluation `eval_loss`; both have `step`."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # a kill in the middle of writing it
        return [self._row(number, line) for number, line in enumerate(lines, 1)]

    def _row(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TrainingError(f"{self.path}: line {number} is not JSON ({error}); remove it") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise TrainingError(f"{self.path}: line {number} is of no step; remove it")
        return row

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after `step`, which a resumed run writes again, and returns those that are left."""
        kept = [row for row in self.rows() if row["step"] <= step] if step else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        fresh.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        fresh.replace(self.path)
        return kept

    def add(self, row: StepMetrics | Mapping[str, Any]) -> None:
        """Appends one line."""
        values = asdict(row) if isinstance(row, StepMetrics) else dict(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(values))


def losses(rows: Sequence[Mapping[str, Any]], name: str = "loss") -> list[tuple[int, float]]:
    """Returns (step, value) of every line of metrics.jsonl that has a finite `name`."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak bytes that torch allocated on the GPU, or without a GPU the peak resident size of this
    process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
