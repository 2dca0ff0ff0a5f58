"""Waits for the disk, and renames folders, on every operating system."""

import os
import secrets
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until `path`, a file or a folder, is on the disk.

    Windows cannot open folders and syncs only files that are open for writing; its renames need no sync of the folder.
    """
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """As `sync`, for every file and folder in `folder` and then for `folder`."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def hidden_sibling(target: Path, state: str) -> Path:
    """A new name beside `target`: `.NAME.STATE-` and eight random hexadecimal digits."""
    return target.parent / f"{siblings_prefix(target, state)}{secrets.token_hex(4)}"


def siblings_prefix(target: Path, state: str) -> str:
    """How the names of `hidden_sibling` begin."""
    return f".{target.name}.{state}-"


def put_in_place(work: Path, target: Path, replaced: str) -> None:
    """Renames the folder `work` to `target`. An older `target` is removed once the new one is there.

    Two renames, since no system replaces a folder that holds files: a kill between them leaves the old folder, complete, under
    a hidden name of state `replaced`.
    """
    old = hidden_sibling(target, replaced)
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    if old.exists():
        shutil.rmtree(old)
