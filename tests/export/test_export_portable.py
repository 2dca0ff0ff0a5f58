"""Without the modules that POSIX alone has, as on Windows: every module is imported, a model is trained a step and exported."""

import subprocess
import sys
from pathlib import Path

import pytest
from export_kit import adapt, base_folder, load

from hasten.export import save_merged
from hasten.export.durable import siblings_prefix, sync

HIDDEN = """
import builtins, importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
for name in ("fcntl", "pwd", "grp", "syslog"):
    sys.modules[name] = None
posix = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "posix"}
stock = builtins.__import__
def guarded(name, globals=None, *rest, **more):  # other packages choose by os.name, so that Linux needs these modules
    if (globals or {}).get("__name__", "").startswith("hasten") and name.split(".")[0] in posix:
        raise ModuleNotFoundError(name)
    return stock(name, globals, *rest, **more)
builtins.__import__ = guarded
"""

EVERYTHING = """
import hasten
for found in pkgutil.walk_packages(hasten.__path__, "hasten."):
    if "kernel" not in found.name:
        importlib.import_module(found.name)
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from export_kit import adapt, load
from hasten.export import save_merged
from hasten.training.metrics import peak_memory_bytes
from hasten.training.resume import sole_writer
model = adapt(load(Path(sys.argv[2])))
for _ in range(2):
    save_merged(model, sys.argv[3])
assert peak_memory_bytes(torch.device("cpu")) > 2**20
with sole_writer(Path(sys.argv[3] + "-run")):
    pass
print(sorted(path.name for path in Path(sys.argv[3]).parent.iterdir()))
"""


def test_without_posix_modules(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    arguments = [str(Path(__file__).parent), str(base), str(tmp_path / "home/out")]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + EVERYTHING, *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "['out', 'out-run']"


@pytest.mark.parametrize("name", ["out[1]", "a*b", "a?b", "it's", "ü"])
def test_what_a_killed_writer_left_is_found_under_any_name(tmp_path: Path, name: str) -> None:
    target = tmp_path / "home" / name
    left = target.parent / f"{siblings_prefix(target, 'writing')}00000000"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    (target.parent / f"{left.name}.lock").write_text("")
    save_merged(adapt(load(base_folder(tmp_path / "base"))), target)
    assert [path.name for path in target.parent.iterdir()] == [name]


def test_sync_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are not opened there, and files are opened for writing."""
    import os

    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or real(path, flags))
    (tmp_path / "file").write_text("a")
    monkeypatch.setattr(os, "name", "nt")
    sync(tmp_path)
    sync(tmp_path / "file")
    monkeypatch.undo()
    assert opened == [(tmp_path / "file", os.O_RDWR)]
