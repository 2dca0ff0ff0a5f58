"""Dequantised NF4 equals bitsandbytes' own, bit for bit in fp32, on both backends, with plain and doubly quantised scales."""

from typing import Any

import pytest
import torch

from hasten.ops.nf4 import NF4Weight, dequantize_nf4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def quantized(shape: tuple[int, int], double: bool) -> tuple[NF4Weight, torch.Tensor]:
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    nested = (
        {"scale_code": state.state2.code, "scale_of_scales": state.state2.absmax, "offset": state.offset}
        if double
        else {}
    )
    return NF4Weight(packed, state.code, shape, state.absmax, **nested), bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (3, 64), (130, 192)])
def test_equals_bitsandbytes(backend: Any, double: bool, shape: tuple[int, int]) -> None:
    weight, expected = quantized(shape, double)
    torch.testing.assert_close(dequantize_nf4(weight, torch.float32, backend=backend), expected, rtol=1e-6, atol=1e-7)
    low = dequantize_nf4(weight, torch.bfloat16, backend=backend)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=8e-3, atol=1e-6)
    padded = torch.full((shape[0], shape[1] + 16), float("nan"), device=DEVICE, dtype=torch.float32)
    dequantize_nf4(weight, torch.float32, padded[:, : shape[1]], backend)
    torch.testing.assert_close(padded[:, : shape[1]], expected, rtol=1e-6, atol=1e-7)
    assert bool(padded[:, shape[1] :].isnan().all())
