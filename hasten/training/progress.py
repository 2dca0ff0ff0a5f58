"""Monitors a Trainer: progress line, metrics.jsonl, loss curve, and a stop at the first gradient or loss that is not
finite."""

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hasten.errors import TrainingError
from hasten.training.curve import plot_losses
from hasten.training.metrics import MetricsFile, StepMetrics, TokenCounter, losses, peak_memory_bytes


class TrainingMonitor(TrainerCallback):
    """A callback and a context: `with counting(model) as c, TrainingMonitor(folder, c) as m: m.watch(trainer).train()`.

    folder: of metrics.jsonl and loss.png. console: shows the progress line; None = no such line. Only the main process
    writes. Leaving the context, also by an exception, ends the progress line and plots the loss curve.
    """

    def __init__(
        self, folder: Path, counter: TokenCounter, console: Console | None = None, title: str = "loss"
    ) -> None:
        self.file = MetricsFile(folder / "metrics.jsonl")
        self.curve = folder / "loss.png"
        self._counter = counter
        self._console = console
        self._title = title
        self._live: Progress | None = None
        self._task = TaskID(0)
        self._main = True
        self._first_step = self._total_tokens = 0
        self._started = self._last_log = 0.0

    def watch(self, trainer: Any) -> Any:
        """Replaces transformers' progress output in `trainer`, and returns it."""
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        trainer.add_callback(self)
        return trainer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        rows = self.file.rows()
        if self._main and losses(rows):
            plot_losses(rows, self.curve, self._title)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens metrics.jsonl (a resumed run keeps the lines up to its checkpoint) and the progress line."""
        self._main = state.is_world_process_zero
        self._first_step = state.global_step
        self._started = self._last_log = time.monotonic()
        self._counter.take()
        if not self._main:
            return
        kept = self.file.rewind(state.global_step)
        self._total_tokens = next((row["total_tokens"] for row in reversed(kept) if "total_tokens" in row), 0)
        if self._console is not None:
            self._live = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[details]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("", total=state.max_steps, completed=state.global_step, details="")
            self._live.start()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises TrainingError before a step that would write NaN or infinity into the weights.

        Not in fp16: its loss scaler expects infinities and skips those steps itself.
        """
        if args.fp16:
            return
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norms = torch._foreach_norm(grads)
        if not torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all():
            raise self._not_finite("the gradient", state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes one line of metrics and updates the progress line. Raises TrainingError where the loss is not
        finite."""
        logs = logs or {}
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise self._not_finite(f"the loss ({logs['loss']})", state.global_step)
        if not self._main:
            return
        if "loss" in logs:
            row = self._row(args, state, logs)
            self.file.add(row)
            self._show(row)
        elif "eval_loss" in logs:
            kept = {name: value for name, value in logs.items() if isinstance(value, int | float)}
            self.file.add({"step": state.global_step, **kept})

    def _row(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> StepMetrics:
        now = time.monotonic()
        tokens, learned = self._counter.take()
        self._total_tokens += tokens
        seconds_per_step = (now - self._started) / max(1, state.global_step - self._first_step)
        row = StepMetrics(
            step=state.global_step,
            epoch=round(state.epoch or 0.0, 4),
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm"),
            learning_rate=logs["learning_rate"],
            tokens=tokens,
            learned_tokens=learned,
            masked_percent=round(100 * (1 - learned / tokens), 2) if tokens else 0.0,
            total_tokens=self._total_tokens,
            tokens_per_second=round(tokens / max(now - self._last_log, 1e-9), 1),
            peak_memory_bytes=peak_memory_bytes(args.device),
            eta_seconds=round(seconds_per_step * (state.max_steps - state.global_step), 1),
        )
        self._last_log = now
        return row

    def _show(self, row: StepMetrics) -> None:
        if self._live is None:
            return
        minutes, seconds = divmod(round(row.eta_seconds), 60)
        details = (
            f"[bold]loss {row.loss:.3f}[/]  {row.tokens_per_second:,.0f} tokens/s  "
            f"ETA {minutes}:{seconds:02d}  {row.peak_memory_bytes / 2**30:.2f} GiB"
        )
        self._live.update(self._task, completed=row.step, details=details)

    def _not_finite(self, what: str, step: int) -> TrainingError:
        written = [row["step"] for row in self.file.rows()] if self._main else []
        last = f"the last good step is {written[-1]}" if written else "no step before it was logged"
        return TrainingError(
            f"step {step}: {what} is not finite; {last}. Training stopped, and no later checkpoint was saved. Lower the "
            "learning rate, set max_grad_norm, or use bfloat16 or float32 instead of float16"
        )
