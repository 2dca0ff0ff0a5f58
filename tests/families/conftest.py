"""What the family tests share."""

import sys

import pytest


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """hasten's own choice of backend, made "triton" for every tensor."""
    for name, module in list(sys.modules.items()):
        if name.startswith("hasten.") and hasattr(module, "backend_for"):
            monkeypatch.setattr(module, "backend_for", lambda x, wanted=None: wanted or "triton")
