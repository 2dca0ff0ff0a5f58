"""Kernels run in Triton's interpreter where there is no GPU; the same tests run them for real where there is one.

Every process of the tests, this one included, is kept offline and out of the working tree (see guard/sitecustomize.py).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiers import mark_full

GUARD = str(Path(__file__).parent / "guard")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [GUARD, os.environ.get("PYTHONPATH")]))
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL's own, sent in a background thread
if "_hasten_guarded" not in sys.modules:
    sys.path.insert(0, GUARD)
    sys.modules.pop("sitecustomize", None)
    import sitecustomize

    sys.modules["_hasten_guarded"] = sitecustomize
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
torch.set_warn_always(True)  # else once per process: which test fails by a warning would depend on those before it


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_full(items)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels() -> Iterator[None]:
    """hasten's choice of backend on a GPU, for CPU tensors too."""
    from hasten.ops.backend import interpreted_kernels

    with interpreted_kernels():
        yield
