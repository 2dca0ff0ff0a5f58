"""Writes a folder atomically: under a hidden name beside the target, then renamed."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hasten.errors import ExportError
from hasten.export.durable import hidden_sibling, put_in_place, siblings_prefix, sync_tree
from hasten.export.fill import must_stay, replace_inside
from hasten.export.shards import write_json

log = logging.getLogger(__name__)

MARKER = "hasten.json"  # in every finished folder: what hasten wrote there, so that it may replace it, and only it
WRITING, REPLACED = "writing", "replaced"
LOCK = ".lock"
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
        work = hidden_sibling(target, WRITING)
        lock = _lock_of(work)
        lock.acquire()  # before the folder is there, so that no other writer takes it for an abandoned one
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error}); nothing was left there") from error
    try:
        work.mkdir()
        yield work
        _seal(work, method)
        check_target(target)
        if must_stay(target):
            replace_inside(work, target, hidden_sibling(target, REPLACED))
        else:
            put_in_place(work, target, REPLACED)
    except OSError as error:
        raise ExportError(f"{target} could not be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _unlock(lock)


def check_target(target: Path) -> None:
    """Raises ExportError if `target` holds anything that hasten did not write."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} is a file or a link; give the name of a new folder")
    if not target.is_dir():
        return
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
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
        return {MARKER, *json.loads((target / MARKER).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):  # no marker of ours: nothing in here is ours
        return set()


def _lock_of(work: Path) -> FileLock:
    """The lock that the writer of `work` holds: a file beside it, since Windows renames no folder with an open file."""
    return FileLock(work.parent / f"{work.name}{LOCK}")


def _unlock(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def _remove_abandoned(target: Path) -> None:
    """Removes what killed writers of the same target left. A running writer holds the lock of its folder."""
    prefix = siblings_prefix(target, WRITING)
    names = {path.name.removesuffix(LOCK) for path in target.parent.iterdir() if path.name.startswith(prefix)}
    for left in (target.parent / name for name in sorted(names)):
        lock = _lock_of(left)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            if left.exists():
                log.warning("removing %s, left by a save that was killed", left)
                shutil.rmtree(left)
        finally:
            _unlock(lock)


def _seal(work: Path, method: str) -> None:
    """Lists the files in the marker and syncs all of them to the disk."""
    files = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    write_json(work / MARKER, {"written_by": "hasten", "save_method": method, "files": files})
    sync_tree(work)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
