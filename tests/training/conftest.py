"""What the training tests share."""

import pytest

from hasten.training.memory import offload


@pytest.fixture
def offload_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of any size are offloaded, in chunks that tiny models fill."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    monkeypatch.setattr(offload, "CHUNK", 4096)
