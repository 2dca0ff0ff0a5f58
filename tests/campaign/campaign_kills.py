"""Judges of kills: SIGKILL in the middle of saves, merges and exports, at a file operation or at a moment drawn from the seed."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from campaign_bases import Bases, load
from cli_kit import write_job
from export_kit import contents
from export_kit import train as stir
from safetensors.torch import load_file

from hasten import FastLanguageModel
from hasten.errors import TrainingError
from hasten.training.config import read_job
from hasten.training.job import run

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
METHODS = {"merge": "merged_16bit", "export 4-bit": "merged_4bit", "export adapter": "lora"}
STEPS, SAVED = 4, 2


@dataclass(frozen=True)
class Moment:
    """Of a kill: at the n-th file operation, or some seconds after the first one."""

    operation: int | None
    seconds: float | None

    def earlier(self) -> "Moment":
        if self.operation is not None:
            return Moment(max(1, self.operation // 2), None)
        return Moment(None, (self.seconds or 0.0) / 2)

    def __str__(self) -> str:
        if self.operation is not None:
            return f"at file operation {self.operation}"
        return f"{1000 * (self.seconds or 0.0):.0f} ms after the first file operation"


def changes_a_file(event: str, args: tuple[Any, ...], home: str) -> bool:
    """Whether an audit event changes something under `home`."""
    if event == "open":
        path, mode, flags = args
        writes = (isinstance(mode, str) and set(mode) & set("wxa+")) or (
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        )
        return bool(writes) and home in str(path)
    return event in CHANGES and home in str(args[0])


def killed(action: Callable[[], Any], home: Path, at: Moment) -> bool:
    """Runs `action` in a process that is killed at its n-th file operation under `home`, or after some seconds of it.

    Returns whether it was killed before its end.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        seen = [0]

        def watch(event: str, args: tuple[Any, ...]) -> None:
            if changes_a_file(event, args, str(home)):
                seen[0] += 1
                if seen[0] == 1:
                    os.write(tell, b"x")
                if seen[0] == at.operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            action()
        finally:
            os._exit(0)
    os.close(tell)
    if at.seconds is not None:
        os.read(ready, 1)  # waits for the first file operation
        time.sleep(at.seconds)
        os.kill(child, signal.SIGKILL)
    os.close(ready)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def moment(rng: random.Random, operations: int, seconds: float) -> Moment:
    return Moment(rng.randint(1, operations), None) if rng.random() < 0.6 else Moment(None, rng.uniform(0, seconds))


def kill_once(action: Callable[[], Any], home: Path, prepare: Callable[[], None], at: Moment) -> Moment:
    """Kills `action`; where it had ended before, once more and earlier, from a prepared start. Returns when it was killed."""
    for _ in range(10):
        prepare()
        if killed(action, home, at):
            return at
        at = at.earlier()
    raise AssertionError("it ends before it can be killed")


def trained(bases: Bases, seed: int) -> tuple[Any, Any]:
    model, tokenizer = load(bases.checkpoint("llama"))
    model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False)
    stir(model, seed)
    return model, tokenizer


def judge_export(bases: Bases, group: str, seed: int, scratch: Path) -> tuple[str, str, str]:
    """An export into a new folder, or over one that an earlier export wrote."""
    rng = random.Random(f"{group}/{seed}")
    method, replaces = METHODS[group], rng.random() < 0.5
    model, tokenizer = trained(bases, 1)
    save = {"save_method": method} | ({} if method == "lora" else {"max_shard_size": "60KB"})
    model.save_pretrained_merged(scratch / "earlier", tokenizer, **save)
    stir(model, 2)
    model.save_pretrained_merged(scratch / "reference", tokenizer, **save)
    old, new = contents(scratch / "earlier"), contents(scratch / "reference")
    home, target = scratch / "home", scratch / "home/out"

    def prepare() -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        if replaces:
            shutil.copytree(scratch / "earlier", target)

    when = kill_once(
        lambda: model.save_pretrained_merged(target, tokenizer, **save), home, prepare, moment(rng, 16, 0.15)
    )
    what = f"{method}, {'replacing one' if replaces else 'new'}, killed {when}"
    (scratch / "what.txt").write_text(what)
    for marker in ("config.json", "adapter_config.json"):
        for found in home.rglob(marker):
            if contents(found.parent) not in (old, new):
                return "silent difference", what, f"{found.parent.name} looks whole, and is not"
    if replaces and not target.is_dir():
        beside = [path.name for path in home.iterdir() if contents(path) in (old, new)]
        return "silent difference", what, f"the old folder is gone; whole beside it: {beside}"
    model.save_pretrained_merged(target, tokenizer, **save)
    if contents(target) != new or [path.name for path in home.iterdir()] != ["out"]:
        return "silent difference", what, f"the next export left {sorted(path.name for path in home.iterdir())}"
    return "whole", what, ""


def job_in(folder: Path, bases: Bases) -> Path:
    """A job of four steps with a checkpoint every two; the data and the model are the bases' own."""
    shutil.copytree(bases.job, folder)
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "assistant_only_loss": False}
    return write_job(folder, train={**settings, "per_device_train_batch_size": 2})


def train(path: Path, resume: bool = False) -> Any:
    return run(read_job(path), FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model, resume=resume)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out/model/adapter_model.safetensors")


def judge_training(bases: Bases, seed: int, scratch: Path) -> tuple[str, str, str]:
    """A training run that saves checkpoints, killed, and then resumed: the same weights, bit for bit."""
    rng = random.Random(f"training/{seed}")
    folder = scratch / "job"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        job_in(folder, bases)

    path = folder / "job.yaml"
    when = kill_once(lambda: train(path), folder / "out", prepare, moment(rng, 60, 1.2))
    what = f"training, killed {when}"
    (scratch / "what.txt").write_text(what)
    outcome, detail = "resumed", ""
    try:
        train(path, resume=True)
    except TrainingError as error:
        if not starts_anew(error, scratch / "job"):
            raise
        detail = "no whole checkpoint yet: started again"
        train(path)
    wanted, found = torch.load(bases.root / "trained.pt", weights_only=True), adapter(scratch / "job")
    if wanted.keys() != found.keys() or not all(torch.equal(found[name], tensor) for name, tensor in wanted.items()):
        apart = [name for name in wanted if name not in found or not torch.equal(found[name], wanted[name])]
        return (
            "silent difference",
            what,
            f"{len(apart)} of {len(wanted)} tensors differ from the run that was not killed",
        )
    return outcome, what, detail


def starts_anew(error: TrainingError, folder: Path) -> bool:
    """Whether a refusal to resume is right: no checkpoint of the run was whole when it was killed."""
    whole = [one for one in (folder / "out").glob("checkpoint-*") if (one / "trainer_state.json").exists()]
    return "checkpoint" in str(error) and not whole
