"""Moves a finished model into an empty folder that exists."""

import os
from pathlib import Path

CONFIG, MARKER = "config.json", "hasten.json"


def fill(work: Path, target: Path) -> None:
    """Moves everything in `work` into the empty folder `target`, which stays the folder that it is.

    It may be the working directory of the user's shell, or the mount point of a volume, which a rename would detach.
    The marker that says whose files these are comes first, and config.json, without which no loader takes the folder
    for a model, last.
    """
    order = {MARKER: 0, CONFIG: 2}
    for path in sorted(work.iterdir(), key=lambda path: (order.get(path.name, 1), path.name)):
        path.rename(target / path.name)
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
