"""Stored weights of every format, against bitsandbytes."""

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from torch import nn

from hasten.weights import dequantize, holds
from hasten.weights.formats import find_format, format_of

OUT, IN = 64, 128


def _four_bit(kind: str, dtype: torch.dtype, double: bool = True) -> tuple[nn.Module, torch.Tensor]:
    dense = torch.randn(OUT, IN).to(dtype)
    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=dtype, quant_type=kind, compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(dense.clone(), quant_type=kind, compress_statistics=double).to("cpu")
    return layer, dense


def _eight_bit() -> tuple[nn.Module, torch.Tensor]:
    dense = torch.randn(OUT, IN)
    layer = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(dense.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return layer, dense


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_gives_bitsandbytes_values(kind: str, dtype: torch.dtype, double: bool) -> None:
    layer, dense = _four_bit(kind, dtype, double)
    expected = bnbf.dequantize_4bit(*bnbf.quantize_4bit(dense, compress_statistics=double, quant_type=kind))
    assert format_of(layer).name == kind
    for wanted in (None, torch.float32, torch.bfloat16):
        got = dequantize(layer, wanted)
        assert got.dtype == (wanted or dtype)
        assert got.shape == (OUT, IN)
        assert torch.equal(got, expected.to(got.dtype))
    assert (dequantize(layer, torch.float32) - dense.float()).norm() / dense.float().norm() < 0.2


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_survives_the_forward_that_may_repack_it(kind: str) -> None:
    """In eval mode on some CPUs bitsandbytes replaces codes and scales by its kernel's layout."""
    layer, dense = _four_bit(kind, torch.bfloat16)
    before = dequantize(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(2, IN, dtype=torch.bfloat16))
    state = layer.weight.quant_state
    repacked = getattr(state, "packing_format_for_cpu", False)
    codes, scales = layer.weight.data.clone(), state.absmax.clone()
    after = dequantize(layer)
    tolerance = 2**-7 if repacked else 0.0  # the layout keeps its scales in bf16
    assert (after.float() - before.float()).abs().max() <= tolerance * before.float().abs().max()
    assert holds(layer, dense)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.quant_state.absmax, scales)
    assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == repacked


def test_int8_before_and_after_the_first_forward() -> None:
    layer, dense = _eight_bit()
    codes, scale, _ = bnbf.int8_vectorwise_quant(dense.half())
    expected = codes.float() * scale[:, None] / 127
    assert format_of(layer).name == "int8"
    for _ in range(2):
        assert torch.allclose(dequantize(layer, torch.float32), expected, rtol=1e-6)
        assert dequantize(layer).dtype == torch.float16
        assert dequantize(layer, torch.bfloat16).dtype == torch.bfloat16
        assert holds(layer, dense)
        with torch.no_grad():
            layer.eval()(torch.randn(2, IN, dtype=torch.float16))


def test_dense_is_the_weight_itself() -> None:
    layer = nn.Linear(IN, OUT)
    assert format_of(layer).name == "dense"
    assert dequantize(layer).data_ptr() == layer.weight.data_ptr()
    assert dequantize(layer, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: _four_bit("nf4", torch.bfloat16), _eight_bit])
def test_holds_sees_a_changed_weight(make) -> None:
    layer, dense = make()
    assert holds(layer, dense)
    assert not holds(layer, dense + 0.3 * torch.randn_like(dense))
    assert not holds(layer, dense[:32])


def test_holds_dense() -> None:
    layer = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    fine = layer.weight.detach().float() * (1 + 2**-12)  # rounds to the same bf16
    assert holds(layer, fine)
    changed = layer.weight.detach().clone()
    changed[0, 0] += 0.5
    assert not holds(layer, changed)


def test_unknown_storage_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int16), requires_grad=False)
    with pytest.raises(TypeError, match="no weight that hasten can read"):
        format_of(layer)
    assert find_format(layer) is None
