"""Checkpoints that the tests of the guarantees only read, made once a session."""

from pathlib import Path

import pytest

from hasten.testing import save_tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Llama whose head is not tied."""
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", max_shard_size="60KB", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers that is not amplified, and so learns in a few steps."""
    return save_tiny(
        tmp_path_factory.mktemp("plain"), "llama", amplify=1.0, num_hidden_layers=2, tie_word_embeddings=False
    )


@pytest.fixture(scope="session")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2: tied head, sliding windows of 8, softcaps."""
    return save_tiny(tmp_path_factory.mktemp("gemma2"), "gemma2")
