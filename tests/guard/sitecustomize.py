"""In every Python process of the tests: no socket leaves the machine, and nothing is written into the working tree.

Python imports this file by itself where its folder is on PYTHONPATH, so processes that tests start are guarded too.
An audit hook sees what libraries do below Python's own wrappers as well, and cannot be taken off again.
"""

import os
import sys
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2]) + os.sep
CACHES = (
    "/__pycache__",
    "/.pytest_cache",
    "/pytest-cache-files-",
    "/.ruff_cache",
    "/.venv",
    "/runs/",
    "/.git/",
    ".egg-info",
)
LOOPBACK = ("127.", "::1", "localhost")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def _in_tree(path: Any) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.path.abspath(os.fsdecode(path))
    return text.startswith(ROOT) and not any(cache in text for cache in CACHES)


def _relative_to_a_handle(args: tuple[Any, ...]) -> bool:
    """An open file, or a name inside an open folder (rmtree works so): where it lies cannot be told from the name."""
    if isinstance(args[0], int):
        return True
    return not os.path.isabs(os.fsdecode(args[0])) and isinstance(args[-1], int) and args[-1] != -1


def _guard(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        address = args[1]
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise PermissionError(f"the tests run offline, but a connection to {address} was tried")
    elif event == "open":
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and _in_tree(path):
            raise PermissionError(f"the working tree is read-only in the tests, but {path} was opened to write")
    elif event in CHANGES and not _relative_to_a_handle(args) and _in_tree(args[0]):
        raise PermissionError(f"the working tree is read-only in the tests, but {event} was called on {args[0]}")


sys.addaudithook(_guard)
