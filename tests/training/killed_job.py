"""Processes that are killed without any warning while they write a checkpoint: `python killed_job.py forks|run ...`."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from resume_kit import train
from training_kit import plain_settings, rows, small, tiny_tokenizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hasten.model import FastLanguageModel
from hasten.training import state_files
from hasten.training.checkpoints import Checkpoint, examine, last_whole
from hasten.training.resume import resumable

WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def kill_at(event: int, inside: str) -> None:
    """Kills this process before its `event`th operation on files whose path has `inside` in it."""
    seen = [0]

    def count(name: str, args: tuple[Any, ...]) -> None:
        if name in WRITES and args and isinstance(args[0], str | os.PathLike) and inside in os.fspath(args[0]):
            seen[0] += 1
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def tear(file: int) -> None:
    """Kills this process in the middle of the `file`th state that is written (`training.state_files`)."""
    save, seen = state_files.save_file, [0]

    def torn(content: Any, path: Any) -> None:
        save(content, path)
        seen[0] += 1
        if seen[0] == file:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    state_files.save_file = torn


class Forks(TrainerCallback):
    """At the last step: saves in one forked process after another, each killed one operation later."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trainer, self.found = folder, None, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 4:
            return
        shutil.copytree(self.folder / "checkpoint-2", self.folder.parent / "kept")
        for kill, number in [*((tear, n) for n in (1, 2, 3)), *((None, n) for n in range(1, 400))]:
            child = os.fork()
            if not child:
                if kill is None:
                    kill_at(number, str(self.folder))
                else:
                    kill(number)
                self.trainer._save_checkpoint(self.trainer.model, None)  # pyright: ignore
                os._exit(0)
            _, status = os.waitpid(child, 0)
            self.found.append(self._look(status))
            self._restore()
            if not status:
                break

    def _look(self, status: int) -> dict[str, Any]:
        visible = {path.name: examine(path) for path in sorted(self.folder.glob("checkpoint-*"))}
        whole = [name for name, found in visible.items() if isinstance(found, Checkpoint)]
        return {"status": status, "visible": list(visible), "whole": whole, "last": last_whole(self.folder).step}

    def _restore(self) -> None:
        shutil.rmtree(self.folder / "checkpoint-4", ignore_errors=True)
        if not (self.folder / "checkpoint-2").exists():
            shutil.copytree(self.folder.parent / "kept", self.folder / "checkpoint-2")
        for left in self.folder.glob(".checkpoint-2.removing-*"):
            shutil.rmtree(left)


def forks(folder: Path) -> None:
    torch.manual_seed(0)
    model = FastLanguageModel.get_peft_model(small("llama", hasten=True), r=4)
    callback = Forks(folder)
    settings = plain_settings(folder, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    callback.trainer = resumable(SFTTrainer)(
        model=model,
        args=SFTConfig(**settings, max_length=64),
        train_dataset=rows(24),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )
    callback.trainer.train()
    (folder.parent / "found.json").write_text(json.dumps(callback.found))


if __name__ == "__main__":
    if sys.argv[1] == "forks":
        forks(Path(sys.argv[2]))
    else:
        job, event = Path(sys.argv[2]), int(sys.argv[3])
        if event:
            kill_at(event, "checkpoint-")
        train(job, resume=any((job.parent / "out").glob("checkpoint-*")))
