"""One token times an NF4 matrix equals the dequantised matrix times it, on both backends."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_kit import DEVICE, both, poisoned_memory
from test_nf4 import quantized

from hasten.ops.nf4 import dequantize_nf4, matvec_nf4
from hasten.ops.nf4.kernels import matvec


@both
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (3, 64), (9, 1088), (2, 8256), (130, 192)])
def test_is_the_dense_product(backend: Any, double: bool, shape: tuple[int, int]) -> None:
    weight, dense = quantized(shape, double)
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = dense.double() @ x.double()
    with poisoned_memory():
        ours = matvec_nf4(weight, x, backend)
    assert ours.shape == (shape[0],)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))
    low = matvec_nf4(weight, x.bfloat16(), backend)
    assert low.dtype == torch.bfloat16
    exact = dense.double() @ x.bfloat16().double()
    torch.testing.assert_close(low.double(), exact, rtol=2**-7, atol=2**-8 * float(exact.abs().max()))


@both
def test_rows_that_end_inside_a_block_are_dequantised(backend: Any) -> None:
    weight, _ = quantized((4, 96), False)
    assert not matvec.is_served(weight)
    x = torch.randn(96, device=DEVICE)
    expected = dequantize_nf4(weight, torch.float32, backend="reference") @ x
    torch.testing.assert_close(matvec_nf4(weight, x, backend), expected, rtol=1e-4, atol=1e-4)


def test_unaligned_codes_are_not_served() -> None:
    weight, _ = quantized((4, 64), False)
    shifted = torch.cat([weight.packed.new_zeros(3), weight.packed.reshape(-1)])[3:]
    assert matvec.is_served(weight)
    assert not matvec.is_served(replace(weight, packed=shifted))
