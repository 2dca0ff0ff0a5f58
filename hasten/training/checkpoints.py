"""Checkpoints that are whole or not there: written beside the run under a hidden name, listed in a manifest, then renamed."""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from hasten.errors import TrainingError
from hasten.export.durable import hidden_sibling, put_in_place, sync_tree
from hasten.export.shards import write_json
from hasten.training.state_files import state_problems

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
WRITING = ".checkpoint-writing"
"""The folder, in the run's output, in which a checkpoint is written."""
MANIFEST = "hasten_checkpoint.json"
TRAINER_STATE = "trainer_state.json"
NEEDED: Mapping[str, tuple[str, ...]] = {
    "weights": ("model*.safetensors", "adapter_model*", "pytorch_model*", "global_step*"),
    "optimizer state": ("optimizer*", "global_step*"),
    "scheduler state": ("scheduler*", "global_step*"),
    "random state": ("rng_state*",),
    "trainer state": (TRAINER_STATE,),
}
"""What a checkpoint must hold -> the names that it may have (FSDP and DeepSpeed write folders)."""
WHOLE, STRIDE, BLOCK = 2**30, 2**26, 2**20
"""Bytes: files up to WHOLE are hashed completely, of larger ones the first BLOCK of each STRIDE, and their end."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. fingerprint, versions: of the run that wrote it; None and empty for one that hasten
    did not write. state: trainer_state.json. forced: other settings are accepted."""

    folder: Path
    step: int
    fingerprint: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    forced: bool = False


def publish(work: Path, target: Path, step: int, fingerprint: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Lists the files of `work` with sizes and hashes, waits for the disk, and renames it to `target`."""
    files = sorted(path for path in work.rglob("*") if path.is_file())
    listed = {path.relative_to(work).as_posix(): _facts(path) for path in files}
    content = {"written_by": "hasten", "step": step, "files": listed, "fingerprint": fingerprint, "versions": versions}
    write_json(work / MANIFEST, content)
    sync_tree(work)
    put_in_place(work, target, "replaced")


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`, but not the newest and the best. Each disappears in one step."""
    if limit is None or limit <= 0:
        return
    newest_first = sorted(_steps(folder).items(), reverse=True)
    kept = [path for _, path in newest_first[:1]]
    kept += [path for _, path in newest_first[1:] if best is not None and path == Path(best)]
    for _, path in newest_first[1:]:
        if path in kept:
            continue
        if len(kept) < limit:
            kept.append(path)
            continue
        gone = hidden_sibling(path, "removing")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, whole or not, in ascending order."""
    return sorted(_steps(folder))


def last_whole(folder: Path) -> Checkpoint:
    """The newest whole checkpoint in `folder`. Names the damaged ones that it skips in the log.

    Raises TrainingError where there is none, with what is wrong with each.
    """
    damaged = []
    for _, path in sorted(_steps(folder).items(), reverse=True):
        found = examine(path)
        if isinstance(found, Checkpoint):
            for line in damaged:
                logger.warning("skipping %s", line)
            return found
        damaged.append(f"{path}: {'; '.join(found)}")
    if damaged:
        lines = "\n".join(f"  {line}" for line in damaged)
        raise TrainingError(
            f"{folder} holds no whole checkpoint to resume from:\n{lines}\nTrain without --resume, in a new folder"
        )
    raise TrainingError(
        f"{folder} holds no checkpoint to resume from; train without --resume, and set train.save_steps so that "
        "checkpoints are written"
    )


def examine(folder: Path) -> Checkpoint | list[str]:
    """The checkpoint in `folder`, or what is missing or damaged in it. Reads every file that the manifest lists."""
    if not folder.is_dir():
        return [f"{folder} is no folder"]
    try:
        problems = _missing(folder)
        manifest = _manifest(folder)
        problems += _unlike(folder, manifest) if manifest is not None else _torn(folder)
        problems += [] if problems else _unreadable(folder)
        state = {} if problems else asdict(TrainerState.load_from_json(str(folder / TRAINER_STATE)))
        step = state.get("global_step")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"it cannot be read ({type(error).__name__}: {error})"]
    if problems:
        return problems
    if not isinstance(step, int) or (folder.name.startswith(PREFIX) and folder.name != f"{PREFIX}{step}"):
        return [f"{TRAINER_STATE} is of step {step}"]
    if manifest is None:
        return Checkpoint(folder, step, state=state)
    return Checkpoint(folder, step, manifest["fingerprint"], manifest["versions"], state)


def set_aside_later(checkpoint: Checkpoint) -> None:
    """Hides damaged checkpoints that are newer than `checkpoint`, so that no other program takes them for the newest."""
    for step, path in _steps(checkpoint.folder.parent).items():
        if step > checkpoint.step:
            hidden = hidden_sibling(path, "damaged")
            path.rename(hidden)
            logger.warning("%s is damaged; it is now %s", path, hidden)


def clear_writing(folder: Path) -> Path:
    """An empty folder to write a checkpoint into, inside `folder`. Removes what a killed save left there."""
    work = folder / WRITING
    if work.exists():
        logger.warning("removing %s, left by a save that was killed", work)
        shutil.rmtree(work)
    work.mkdir(parents=True)
    return work


def _steps(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    names = {path: path.name.removeprefix(PREFIX) for path in folder.iterdir() if path.name.startswith(PREFIX)}
    return {int(name): path for path, name in names.items() if name.isascii() and name.isdigit() and path.is_dir()}


def _missing(folder: Path) -> list[str]:
    return [
        f"it holds no {what} ({' or '.join(names[:1])})"
        for what, names in NEEDED.items()
        if not any(True for name in names for _ in folder.glob(name))
    ]


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none. Raises ValueError for one that is not hasten's."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = ("files", "fingerprint", "versions")
    fits = isinstance(content, dict) and all(isinstance(content.get(name), dict) for name in parts)
    if not fits or not all(isinstance(facts, list) and len(facts) == 2 for facts in content["files"].values()):
        raise ValueError(f"{MANIFEST} is damaged")
    return content


def _unlike(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that are missing or not as the manifest says."""
    problems = []
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        if not Path(name).parts or ".." in Path(name).parts or Path(name).is_absolute():
            problems.append(f"{MANIFEST} lists {name!r}, a file outside of the checkpoint")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{name} has {path.stat().st_size} of {size} bytes")
        elif _digest(path) != digest:
            problems.append(f"{name} was changed since it was written")
    listed = manifest["files"].keys()
    for what, names in NEEDED.items():
        if not any(
            Path(name).parts[:1] == (path.name,) for name in listed for each in names for path in folder.glob(each)
        ):
            problems.append(f"{MANIFEST} lists no {what}")
    return problems


def _torn(folder: Path) -> list[str]:
    """Without a manifest: torch's files that are no whole archive. Their archives have checksums."""
    problems = []
    for path in [*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]:
        try:
            with zipfile.ZipFile(path) as archive:
                torn = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            torn = str(error)
        if torn is not None:
            problems.append(f"{path.name} is damaged ({torn})")
    return problems


def _unreadable(folder: Path) -> list[str]:
    problems = state_problems(folder)
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{path.name} is damaged ({error})")
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        problems += [f"{name} is missing" for name in sorted(shards) if not (folder / name).is_file()]
    return problems


def _facts(path: Path) -> list[Any]:
    return [path.stat().st_size, _digest(path)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for start in [*range(0, size, STRIDE), size - BLOCK]:
            file.seek(start, os.SEEK_SET)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
