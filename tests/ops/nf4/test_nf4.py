"""Dequantised NF4 equals bitsandbytes' own, on both backends: scales of both kinds, any shape, any place in a buffer."""

from typing import Any

import pytest
import torch
from device_kit import DEVICE
from ops_kit import both, quantized

from hasten.ops.nf4 import NF4Weight, dequantize_nf4
from hasten.ops.nf4.kernels import dequantize as kernel

BF16_ROUNDING = 2**-8 if DEVICE == "cuda" else 2**-7
"""Triton's interpreter truncates where a GPU rounds to nearest."""


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected.to(ours.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (3, 64), (130, 192)])
def test_equals_bitsandbytes(backend: Any, double: bool, shape: tuple[int, int]) -> None:
    weight, expected = quantized(shape, double)
    assert_same(dequantize_nf4(weight, torch.float32, backend=backend), expected)
    low = dequantize_nf4(weight, torch.bfloat16, backend=backend)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=BF16_ROUNDING, atol=1e-6)
    padded = torch.full((shape[0], shape[1] + 16), float("nan"), device=DEVICE, dtype=torch.float32)
    dequantize_nf4(weight, torch.float32, padded[:, : shape[1]], backend)
    assert_same(padded[:, : shape[1]], expected)
    assert bool(padded[:, shape[1] :].isnan().all())


@both
@pytest.mark.parametrize("shape", [(3, 5), (7, 8), (10, 40), (1, 1), (5, 66), (0, 64)])
def test_shapes_that_fill_no_block(backend: Any, shape: tuple[int, int]) -> None:
    """The blocks run on over the rows' ends, and the last one is cut short. Spelled out here: not every build of
    bitsandbytes takes such shapes."""
    count = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (count + count % 2,), generator=generator, dtype=torch.uint8).to(DEVICE)
    code = torch.linspace(-1, 1, 16, device=DEVICE)
    scales = torch.rand(-(-count // 64), generator=generator).to(DEVICE)
    weight = NF4Weight(codes[0::2] << 4 | codes[1::2], code, shape, scales)
    expected = torch.tensor([code[codes[i].long()] * scales[i // 64] for i in range(count)]).to(DEVICE).view(shape)
    assert_same(dequantize_nf4(weight, torch.float32, backend=backend), expected)
    padded = torch.full((shape[0], shape[1] + 3), float("nan"), device=DEVICE)
    dequantize_nf4(weight, torch.float32, padded[:, : shape[1]], backend)
    assert_same(padded[:, : shape[1]], expected)
    assert bool(padded[:, shape[1] :].isnan().all())


@both
def test_several_weights_in_one_buffer(backend: Any) -> None:
    """Row slices of one matrix, for one matmul; nothing but the slice is written."""
    buffer = torch.full((64 + 3 + 130 + 1, 192), float("nan"), device=DEVICE)
    row = 0
    for rows in (64, 3, 130):
        weight, expected = quantized((rows, 192), True)
        out = dequantize_nf4(weight, torch.float32, buffer[row : row + rows], backend)
        assert out.data_ptr() == buffer[row].data_ptr()
        assert_same(buffer[row : row + rows], expected)
        row += rows
        assert bool(buffer[row:].isnan().all())


@both
@pytest.mark.parametrize("block", [128, 1024])
def test_other_block_sizes(backend: Any, block: int) -> None:
    weight, expected = quantized((18, 1024), True, block)  # bitsandbytes on a CPU misreads rows that end in a block
    assert_same(dequantize_nf4(weight, torch.float32, backend=backend), expected)


@pytest.mark.parametrize("launch", kernel.LAUNCHES, ids=str)
@pytest.mark.parametrize("apart", [0, 16])
def test_every_launch_gives_the_same(launch: kernel.Launch, apart: int) -> None:
    """Rows of 1.2 programs of the largest launch, so that every one has a full program and one that is cut short."""
    weight, expected = quantized((2, 19200), True)
    out = torch.full((2, 19200 + apart), float("nan"), device=DEVICE)[:, :19200]
    assert_same(kernel.dequantize_nf4(weight, torch.float32, out, launch), expected)


def test_packed_bytes_anywhere_in_memory() -> None:
    weight, expected = quantized((6, 64), False)
    moved = torch.zeros(weight.packed.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
    moved.copy_(weight.packed.reshape(-1))
    shifted = NF4Weight(moved, weight.code, weight.shape, weight.scales)
    assert_same(dequantize_nf4(shifted, torch.float32, backend="triton"), expected)
