"""Tiny checkpoints on disk, made once a session and only read; `copy_of` gives one that a test may break."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.testing import save_tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded fp32 Llama, head not tied."""
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", max_shard_size="100KB")


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma: head tied to the embedding, not safe in fp16."""
    return save_tiny(tmp_path_factory.mktemp("gemma"), "gemma")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))
