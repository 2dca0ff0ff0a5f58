"""How a trainer stores and loads its states: as safetensors and JSON, with errors that name the checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import CheckpointError
from hasten.training.state_files import has_state, random_state, read_state, set_random_state, write_state


class PlainStates:
    """Mixed in before transformers' Trainer. A checkpoint that other programs wrote is loaded as the trainer itself does."""

    if TYPE_CHECKING:  # of the Trainer

        def __getattr__(self, name: str) -> Any: ...

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _reading(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # sharded: in formats of their own
            super()._save_optimizer_and_scheduler(output_dir)  # pyright: ignore[reportAttributeAccessIssue]
        elif self.args.should_save:
            write_state(Path(output_dir) / "optimizer", self.optimizer.state_dict())
            write_state(Path(output_dir) / "scheduler", self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint, "optimizer and scheduler"):
            if checkpoint is None or not has_state(Path(checkpoint) / "optimizer"):
                super()._load_optimizer_and_scheduler(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                self.optimizer.load_state_dict(read_state(Path(checkpoint) / "optimizer"))
                self.lr_scheduler.load_state_dict(read_state(Path(checkpoint) / "scheduler"))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            write_state(Path(output_dir) / "scaler", scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint, "scaler"):
            if checkpoint is None or not has_state(Path(checkpoint) / "scaler"):
                super()._load_scaler(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                self.accelerator.scaler.load_state_dict(read_state(Path(checkpoint) / "scaler"))

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # this process may be ahead of the one that saves the model
        write_state(_random_stem(self, output_dir), random_state(self.args.world_size > 1))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint, "random state"):
            if checkpoint is None or not has_state(_random_stem(self, checkpoint)):
                super()._load_rng_state(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                set_random_state(read_state(_random_stem(self, checkpoint)))


def _random_stem(trainer: Any, folder: str) -> Path:
    """Where a process stores the state of its random generators."""
    return Path(folder) / (f"rng_state_{trainer.args.process_index}" if trainer.args.world_size > 1 else "rng_state")


@contextmanager
def _reading(folder: str | None, what: str) -> Iterator[None]:
    """Errors of torch, PEFT and safetensors about what a checkpoint holds become one that names it."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"the {what} of {folder} cannot be loaded ({type(error).__name__}: {error})") from error
