"""Judges of kills: SIGKILL in the middle of saves, merges and exports, at a file operation or at a moment drawn from the seed."""

import json
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
from safetensors import SafetensorError
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
    if wrong := looks_whole(home, scratch):
        return "silent difference", what, f"{wrong} looks whole, and is not"
    beside = [path for path in home.iterdir() if path.name.startswith(".out.replaced-")]
    if replaces and not target.is_dir() and not any(contents(path) == old for path in beside):
        return (
            "silent difference",
            what,
            f"the old folder is gone; left are {sorted(path.name for path in home.iterdir())}",
        )
    model.save_pretrained_merged(target, tokenizer, **save)
    left = [path.name for path in home.iterdir() if path != target and path not in beside]
    if contents(target) != new or left:
        return "silent difference", what, f"the next export left {left}"
    return "whole", what, "the old folder is beside the new one" if beside else ""


def looks_whole(home: Path, scratch: Path) -> str:
    """The name of a folder that loads, and holds other tensors than the earlier and the new export."""
    expected = [tensors_of(scratch / name) for name in ("earlier", "reference")]
    for marker in ("config.json", "adapter_config.json"):
        for found in home.rglob(marker):
            tensors = tensors_of(found.parent)
            if tensors is not None and not any(same(tensors, one) for one in expected):
                return found.parent.name
    return ""


def tensors_of(folder: Path) -> dict[str, torch.Tensor] | None:
    """All tensors of a checkpoint or adapter as a loader finds them; None where one would refuse it."""
    index = folder / "model.safetensors.index.json"
    try:
        json.loads(
            (
                folder / "config.json" if (folder / "config.json").exists() else folder / "adapter_config.json"
            ).read_text()
        )
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
        single = names if names else [path.name for path in folder.glob("*.safetensors")]
        return {name: tensor for file in single for name, tensor in load_file(folder / file).items()} or None
    except (OSError, ValueError, SafetensorError):
        return None


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor] | None) -> bool:
    return other is not None and one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


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
    detail = ""
    try:
        train(path, resume=True)
    except TrainingError as error:
        if starts_anew(error, folder):
            detail = "no whole checkpoint yet: started again"
            train(path)
        elif (folder / "out/model").is_dir():
            detail = f"nothing left to do: {error}"
        else:
            return "silent difference", what, f"does not go on, and no model is there: {error}"
    wanted, found = torch.load(bases.root / "trained.pt", weights_only=True), adapter(folder)
    if not same(found, wanted):
        apart = [name for name in wanted if name not in found or not torch.equal(found[name], wanted[name])]
        return (
            "silent difference",
            what,
            f"{len(apart)} of {len(wanted)} tensors differ from the run that was not killed",
        )
    return "resumed", what, detail


def starts_anew(error: TrainingError, folder: Path) -> bool:
    """Whether a refusal to resume is right: no checkpoint of the run was whole when it was killed."""
    whole = [one for one in (folder / "out").glob("checkpoint-*") if (one / "trainer_state.json").exists()]
    return "checkpoint" in str(error) and not whole
