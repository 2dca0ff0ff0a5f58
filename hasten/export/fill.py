"""Puts a finished model into a folder that must stay the folder that it is."""

import shutil
from pathlib import Path

from hasten.export.durable import sync

CONFIG, MARKER = "config.json", "hasten.json"


def must_stay(target: Path) -> bool:
    """Returns whether `target` exists and cannot be exchanged for another folder by a rename: the working directory,
    which a shell would go on to see without its files, a mount point, or an empty folder, which may be either of
    another process."""
    return target.is_dir() and (not any(target.iterdir()) or target.samefile(Path.cwd()) or target.is_mount())


def replace_inside(work: Path, target: Path, old: Path) -> None:
    """Moves what is in `target` to the new folder `old`, and everything in `work` to `target`; then removes `old`.

    The marker that says whose files these are comes first, and config.json, without which no loader takes the folder
    for a model, last. On an error the old content comes back; a kill leaves it, complete, in `old`.
    """
    old.mkdir()
    for path in sorted(target.iterdir(), key=lambda path: path.name != CONFIG):
        path.rename(old / path.name)
    order = {MARKER: 0, CONFIG: 2}
    moved: list[Path] = []
    try:
        for path in sorted(work.iterdir(), key=lambda path: (order.get(path.name, 1), path.name)):
            moved.append(path.rename(target / path.name))
    except OSError:
        for path in reversed(moved):
            path.rename(work / path.name)
        for path in old.iterdir():
            path.rename(target / path.name)
        old.rmdir()
        raise
    sync(target)
    shutil.rmtree(old)
