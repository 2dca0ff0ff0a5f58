"""One token times an NF4 matrix equals the dequantised matrix times it, on both backends."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from ops_kit import both, poisoned_memory, quantized

from hasten.ops.glu import ACTIVATIONS
from hasten.ops.matvec import Part
from hasten.ops.nf4 import NF4Weight, dequantize_nf4, matvecs_nf4
from hasten.ops.nf4.kernels import matvec


def matvec_nf4(weight: NF4Weight, x: torch.Tensor, backend: Any) -> torch.Tensor:
    return matvecs_nf4([Part(weight)], x, backend=backend)


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


@both
@pytest.mark.parametrize("rank", [0, 3])
def test_several_linears_are_one_launch(backend: Any, rank: int) -> None:
    parts, exact = [], []
    x, xa = torch.randn(192, device=DEVICE), torch.randn(2, 3 * rank, device=DEVICE)
    for index, rows in enumerate((17, 3, 6)):
        weight, dense = quantized((rows, 192), True)
        b = torch.randn(rows, rank, device=DEVICE) if rank else None
        bias = torch.randn(rows, device=DEVICE) if rows == 3 else None
        parts.append(Part(weight, bias, b, 0.5))
        y = dense.double() @ x.double() + (0.0 if bias is None else bias)
        exact.append(y if b is None else y + 0.5 * b.double() @ xa[:, index * rank :][:, :rank].double().sum(0))
    residual = torch.randn(26, device=DEVICE)
    with poisoned_memory():
        ours = matvecs_nf4(parts, x, xa, residual, backend=backend)
        gated = matvecs_nf4([parts[0], parts[0]], x, xa[:, : 2 * rank].contiguous(), activation="gelu", backend=backend)
    torch.testing.assert_close(ours.double(), torch.cat(exact) + residual.double(), rtol=2e-5, atol=2e-4)
    up = exact[0]
    if rank:
        up = up + 0.5 * parts[0].b.double() @ (xa[:, rank : 2 * rank] - xa[:, :rank]).double().sum(0)
    torch.testing.assert_close(gated.double(), ACTIVATIONS["gelu"](exact[0]) * up, rtol=1e-4, atol=1e-3)


@both
def test_matrices_of_different_layouts(backend: Any) -> None:
    found = [quantized((5, 64), double) for double in (False, True)]
    x = torch.randn(64, device=DEVICE)
    ours = matvecs_nf4([Part(weight) for weight, _ in found], x, backend=backend)
    torch.testing.assert_close(ours, torch.cat([dense.float() @ x for _, dense in found]), rtol=1e-4, atol=1e-4)


def test_unaligned_codes_are_not_served() -> None:
    weight, _ = quantized((4, 64), False)
    shifted = torch.cat([weight.packed.new_zeros(3), weight.packed.reshape(-1)])[3:]
    assert matvec.is_served(weight)
    assert not matvec.is_served(replace(weight, packed=shifted))
