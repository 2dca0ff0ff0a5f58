"""What the training tests share."""

from collections.abc import Iterator

import pytest

from hasten.training.memory.offload import OffloadSizes, offload_sizes


@pytest.fixture
def offload_everything() -> Iterator[None]:
    """Tensors of any size are offloaded, in chunks that tiny models fill."""
    with offload_sizes(OffloadSizes(chunk=4096, smallest=1)):
        yield
