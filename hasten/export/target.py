"""Checks where a model will be written, before anything that takes minutes: loading, training, merging."""

import os
import shutil
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hasten.errors import ExportError
from hasten.export.folder import SLACK, check_target


def absolute(folder: str | Path) -> Path:
    """Returns the folder's absolute path; "." and ".." have no name of their own. A link stays a link."""
    if not isinstance(folder, str | Path) or not str(folder).strip() or "\0" in str(folder):
        raise ExportError(f"{folder!r} was given as the folder to write; pass a path")
    return Path(os.path.abspath(Path(folder).expanduser()))


def check_writable(folder: str | Path, needed: int = 0) -> Path:
    """Returns the absolute path of `folder`. Raises ExportError where a model of `needed` bytes cannot be written there:
    files of others in it, no permission, no space."""
    target = absolute(folder)
    try:
        check_target(target)
        parent = next(path for path in target.parents if path.exists())
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error.strerror or error}); pass another folder") from error
    if not parent.is_dir():
        raise ExportError(f"{target} cannot be written, since {parent} is a file; pass another folder")
    for place in [parent, *([target] if target.is_dir() else [])]:
        if not os.access(place, os.W_OK | os.X_OK):
            raise ExportError(f"{target} cannot be written: no permission in {place}; pass another folder")
    if free < needed + SLACK:
        raise ExportError(
            f"{target} needs {(needed + SLACK) / 2**30:.2f} GiB and {parent} has {free / 2**30:.2f} GiB free; nothing was "
            "written. Free some space or pass another folder"
        )
    return target


def check_repo_id(repo_id: str) -> None:
    """Raises ExportError for text that cannot be the name of a hub repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(
            f"{repo_id!r} cannot be the name of a hub repository: {error}. Pass a name such as owner/model"
        ) from error
