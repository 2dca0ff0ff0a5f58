"""Writes a folder atomically: under a hidden name beside the target, then renamed."""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hasten.errors import ExportError
from hasten.export.fill import must_stay, replace_inside
from hasten.export.shards import write_json

log = logging.getLogger(__name__)

MARKER = "hasten.json"  # in every finished folder: what hasten wrote there, so that it may replace it, and only it
WRITING, REPLACED = "writing", "replaced"
SLACK = 32 * 2**20  # bytes beside the weights: tokenizer, configs, headers


@contextlib.contextmanager
def new_folder(target: Path, needed: int, method: str) -> Iterator[Path]:
    """Yields an empty folder to write into; on leaving it becomes `target`, or on any error it is removed.

    An older `target` is replaced only if hasten wrote all of it, and only once the new one is complete. Raises
    ExportError for a foreign target, for less than `needed` bytes of free space, and for a disk that fills up meanwhile.
    """
    check_target(target)
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        free = shutil.disk_usage(parent).free
        if free < needed + SLACK:
            raise ExportError(
                f"{target} needs {_gib(needed + SLACK)} and {parent} has {_gib(free)} free; nothing was written. Free "
                "some space or save elsewhere (an older copy is only removed once the new one is complete)"
            )
        work = _hidden(target, WRITING)
        work.mkdir()
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error}); nothing was left there") from error
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
        _seal(work, method)
        _put_in_place(work, target)
    except OSError as error:
        raise ExportError(f"{target} could not be written ({error}); nothing was left there") from error
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raises ExportError if `target` holds anything that hasten did not write."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} is a file or a link; give the name of a new folder")
    if not target.is_dir():
        return
    found = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
    if not found:
        return
    ours = _listed(target)
    foreign = sorted(found - ours)
    if foreign:
        raise ExportError(
            f"{target} already holds files that hasten did not write ({', '.join(foreign[:5])}"
            f"{', ...' if len(foreign) > 5 else ''}); they would be lost. Give a new folder, or move them away"
        )


def _listed(target: Path) -> set[str]:
    try:
        return {MARKER, *json.loads((target / MARKER).read_text())["files"]}
    except (OSError, ValueError, KeyError, TypeError):  # no marker of ours: nothing in here is ours
        return set()


def _hidden(target: Path, state: str) -> Path:
    return target.parent / f".{target.name}.{state}-{secrets.token_hex(4)}"


def _remove_abandoned(target: Path) -> None:
    """Removes what killed writers of the same target left. A running writer holds a lock on its folder."""
    for left in target.parent.glob(f".{target.name}.{WRITING}-*"):
        lock = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)
        log.warning("removing %s, left by a save that was killed", left)
        shutil.rmtree(left)


def _seal(work: Path, method: str) -> None:
    """Lists the files in the marker and syncs all of them to the disk."""
    files = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    write_json(work / MARKER, {"written_by": "hasten", "save_method": method, "files": files})
    for path in [*work.rglob("*"), work]:
        _sync(path)


def _put_in_place(work: Path, target: Path) -> None:
    """Two renames: a kill between them leaves the old folder, complete, under a hidden name that nothing removes."""
    check_target(target)
    old = _hidden(target, REPLACED)
    if must_stay(target):
        replace_inside(work, target, old)
        return
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
