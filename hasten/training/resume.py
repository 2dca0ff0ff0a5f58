"""Trainers that write whole checkpoints and resume from verified ones only."""

import importlib.metadata
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open

from hasten import __version__
from hasten.errors import CheckpointError, TrainingError
from hasten.training.checkpoints import (
    PREFIX,
    WRITING,
    Checkpoint,
    clear_writing,
    examine,
    last_whole,
    publish,
    rotate,
    set_aside_later,
    steps_in,
)
from hasten.training.fingerprint import FIXED, differences, fingerprint
from hasten.training.plain_states import PlainStates
from hasten.training.state_files import is_state

logger = logging.getLogger(__name__)

FORCE = "force"
PACKAGES = ("torch", "transformers", "trl", "peft")
LOCK = ".hasten-run.lock"
PICKLED_ARGUMENTS = "training_args.bin"


def resumable(trainer_class: type) -> Any:
    """A subclass of `trainer_class` (transformers' Trainer or any of TRL's) whose checkpoints are safe to resume from.

    A checkpoint appears under its name only when all its files are on the disk. `train(resume_from_checkpoint=...)` takes True (the
    newest whole checkpoint of output_dir), a path, or "force" (as True, in spite of other settings). Raises TrainingError where a
    checkpoint is damaged, where something that changes the run differs from the checkpoint's, and where nothing is left to
    train.
    """

    class Resumable(PlainStates, trainer_class):
        writing: Path | None = None
        run_fingerprint: Mapping[str, Any] | None = None

        def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
            asked = resume_from_checkpoint
            compared = isinstance(asked, Checkpoint) and self.run_fingerprint is not None
            checkpoint = asked if compared else resume_point(self, asked)
            if checkpoint is None:
                return super().train(**kwargs)
            if checkpoint.step >= (total := total_steps(self)):
                raise TrainingError(
                    f"{checkpoint.folder} is of step {checkpoint.step}, and the run has {total}: nothing is left to train"
                )
            self.accelerator.wait_for_everyone()  # until all have looked at the folder
            if self.args.should_save:
                set_aside_later(checkpoint)
            return super().train(resume_from_checkpoint=str(checkpoint.folder), **kwargs)

        def _get_output_dir(self, trial: Any) -> str:
            return super()._get_output_dir(trial) if self.writing is None else str(self.writing)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            run, name = Path(super()._get_output_dir(trial)), f"{PREFIX}{self.state.global_step}"
            if self.args.should_save:
                clear_writing(run)
            self.accelerator.wait_for_everyone()
            self.writing = run / WRITING
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    _publish(self, self.writing / name, run / name)
            finally:
                if self.args.should_save:
                    shutil.rmtree(self.writing, ignore_errors=True)
                self.writing = None
            self.accelerator.wait_for_everyone()
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(run / name))
            if self.args.should_save:
                rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            if self.writing is None:  # while it is written the folder has another name
                super()._push_from_checkpoint(checkpoint_folder)

    Resumable.__name__, Resumable.__qualname__ = trainer_class.__name__, trainer_class.__qualname__
    return Resumable


def resume_point(trainer: Any, asked: Any) -> Checkpoint | None:
    """The verified checkpoint that `asked` names, None where it names none. asked: as `resumable` says, or a Checkpoint.

    Takes the fingerprint of the run. Raises TrainingError for damaged checkpoints and those of another run.
    """
    trainer.model.train()  # casts trained weights to the dtypes that they train in
    trainer.run_fingerprint = fingerprint(trainer)
    if asked is None or asked is False:
        return None
    if isinstance(asked, Checkpoint):
        checkpoint = asked
    elif asked is True or asked == FORCE:
        checkpoint = last_whole(Path(trainer.args.output_dir))
    else:
        checkpoint = _at(Path(asked))
    _check_same(checkpoint, trainer, force=asked == FORCE or (isinstance(asked, Checkpoint) and asked.forced))
    _check_shapes(checkpoint, trainer.model)
    return checkpoint


def total_steps(trainer: Any) -> int:
    """The optimizer steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def load_weights(trainer: Any, checkpoint: Checkpoint) -> None:
    """Gives the trainer's model the weights that the run ended with: those of `checkpoint`, the last one, or of the best one
    where that was asked for. Raises TrainingError where the best one is damaged."""
    best = checkpoint.state.get("best_model_checkpoint")
    if trainer.args.load_best_model_at_end and best:
        checkpoint = _at(checkpoint.folder.parent / Path(best).name)
    trainer._load_from_checkpoint(str(checkpoint.folder))


def refuse_used(folder: Path) -> None:
    """Raises TrainingError if `folder` holds checkpoints, which a new run would mix with its own, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; give another train.output_dir")
    if steps := steps_in(folder):
        raise TrainingError(
            f"{folder} holds checkpoints of an earlier run (steps {', '.join(map(str, steps[-5:]))}), and this would start a "
            "new one. Continue it with --resume, give another train.output_dir, or remove the folder"
        )


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds the lock of a run's output folder. Raises TrainingError where another process trains into it."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainingError(
            f"another process trains into {folder}; wait for it, or give another train.output_dir"
        ) from error
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written ({error}); give another train.output_dir") from error
    try:
        yield
    finally:
        lock.release()
        (folder / LOCK).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    return {"hasten": __version__, **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _publish(trainer: Any, work: Path, target: Path) -> None:
    """Completes what the trainer wrote into `work`, and makes it `target`. The arguments are stored as JSON, not as a pickle."""
    if (work / PICKLED_ARGUMENTS).exists():
        (work / PICKLED_ARGUMENTS).unlink()
        (work / "training_args.json").write_text(trainer.args.to_json_string() + "\n", encoding="utf-8")
    if trainer.state.best_model_checkpoint == str(work):
        trainer.state.best_model_checkpoint = str(target)
        trainer.state.save_to_json(str(work / "trainer_state.json"))
    publish(work, target, trainer.state.global_step, trainer.run_fingerprint or {}, versions())


def _at(folder: Path) -> Checkpoint:
    found = examine(folder)
    if isinstance(found, Checkpoint):
        return found
    raise TrainingError(f"{folder} is no whole checkpoint to resume from: {'; '.join(found)}")


def _check_same(checkpoint: Checkpoint, trainer: Any, force: bool) -> None:
    """Raises TrainingError with every difference between the run that wrote `checkpoint` and this one, unless forced."""
    ways = "Continue with --resume force, or train in a new folder (train.output_dir)"
    if not checkpoint.fingerprint:
        text = f"{checkpoint.folder} has no fingerprint of its run: hasten train did not write it"
        if not force:
            raise TrainingError(f"{text}, so its settings cannot be compared with these. {ways}")
        logger.warning("%s; resuming from it as forced", text)
        return
    found = differences(checkpoint.fingerprint, trainer.run_fingerprint)
    if changed := [f"{name} {checkpoint.versions.get(name)}, now {now}" for name, now in versions().items()
                   if checkpoint.versions.get(name, now) != now]:  # fmt: skip
        logger.warning("%s was written with %s; bits may differ", checkpoint.folder, ", ".join(changed))
    if not found:
        return
    lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(found.values(), 1))
    fixed = [name for name in found if name in FIXED]
    if fixed:
        ways = (
            f"The optimizer's state does not fit the new {', '.join(fixed)}, so this cannot be forced: train in a new folder "
            "(train.output_dir), or go back to the checkpoint's settings"
        )
    if fixed or not force:
        raise TrainingError(f"{checkpoint.folder} is of a run with other settings:\n{lines}\n{ways}")
    logger.warning("resuming from %s as forced, with other settings:\n%s", checkpoint.folder, lines)


def _check_shapes(checkpoint: Checkpoint, model: Any) -> None:
    """Raises CheckpointError where a weight of the checkpoint has another shape than the model's, or no place in an adapter."""
    if checkpoint.fingerprint:
        return
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        own = {
            name: tuple(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
    else:
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in sorted(path for path in checkpoint.folder.glob("*.safetensors") if not is_state(path)):
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if not stored.keys() & own.keys():
            raise CheckpointError(f"{path} holds none of the weights that train here; train in a new folder")
        for name in sorted(stored.keys() & own.keys()):
            if stored[name] != own[name]:
                raise CheckpointError(
                    f"{path}: {name} is {stored[name]}, and {own[name]} in this model; train in a new folder"
                )
