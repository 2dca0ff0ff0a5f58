"""A dense matrix times one token, on both backends, against fp64."""

from typing import Any

import pytest
import torch
from ops_kit import DEVICE, DTYPES, both, poisoned_memory

from hasten.ops.matvec import matvec


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (3, 2048), (7, 4096), (2, 5000), (1, 1), (4, 2049)])
def test_is_the_product(backend: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(shape[0], shape[1] + 8, generator=generator).to(DEVICE, dtype)
    x = torch.randn(shape[1], generator=generator).to(DEVICE, dtype)
    weight = wide[:, : shape[1]]  # rows that are apart
    exact = weight.double() @ x.double()
    with poisoned_memory():
        ours = matvec(weight, x, backend)
    assert (ours.shape, ours.dtype) == ((shape[0],), dtype)
    limit = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(ours.double(), exact, rtol=2 * limit, atol=2 * limit * float(exact.abs().max()))
