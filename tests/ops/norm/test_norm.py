"""RMSNorm and LayerNorm, alone, beside a residual and added to one, against torch's own norms in fp64."""

from typing import Any

import pytest
import torch
from ops_kit import DTYPES, assert_as_good_as_torch, both
from torch.nn import functional as F

from hasten.ops import NormConfig, add_norm, norm, norm_with_residual


def rms_formula(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5) * w


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 1, 1), (7, 33), (2, 3, 4, 24)])
@pytest.mark.parametrize("fp32_weight", [False, True])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], fp32_weight: bool, backend: Any) -> None:
    inputs = [torch.randn(shape) * 3, torch.randn(shape[-1])]
    plain, shifted = (NormConfig(1e-5, unit_offset=offset, fp32_weight=fp32_weight) for offset in (False, True))
    assert_as_good_as_torch(lambda x, w: norm(x, w, plain, backend), rms_formula, inputs, dtype)
    offset = [inputs[0], inputs[1] - 1]
    assert_as_good_as_torch(
        lambda x, w: norm(x, w, shifted, backend), lambda x, w: rms_formula(x, 1 + w), offset, dtype
    )


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_shape", [(24,), (4, 24)])
def test_layer_norm_with_one_and_two_dimensional_weights(
    dtype: torch.dtype, weight_shape: tuple[int, ...], backend: Any
) -> None:
    inputs = [torch.randn(2, 5, 4, 24) * 3 + 1, torch.randn(weight_shape)]
    config = NormConfig(1e-5, "layer", fp32_weight=True)
    formula = lambda x, w: F.layer_norm(x, x.shape[-1:], eps=1e-5) * w  # noqa: E731
    assert_as_good_as_torch(lambda x, w: norm(x, w, config, backend), formula, inputs, dtype)


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_and_pass_adds_both_gradients(dtype: torch.dtype, kind: Any, backend: Any) -> None:
    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        normed, passed = norm_with_residual(x, w, NormConfig(1e-5, kind), backend)
        assert torch.equal(passed, x)
        return torch.stack((normed, passed))

    def formula(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        normalise = F.rms_norm if kind == "rms" else F.layer_norm
        return torch.stack((normalise(x, x.shape[-1:], eps=1e-5) * w, x))

    assert_as_good_as_torch(ours, formula, [torch.randn(3, 5, 33), torch.randn(33)], dtype)


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("fp32_weight", [False, True])
def test_norm_onto_a_residual(dtype: torch.dtype, kind: Any, fp32_weight: bool, backend: Any) -> None:
    def ours(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return add_norm(x, w, residual, NormConfig(1e-5, kind, fp32_weight=fp32_weight), backend)

    def formula(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        normalise = F.rms_norm if kind == "rms" else F.layer_norm
        return residual + normalise(x, x.shape[-1:], eps=1e-5) * w

    inputs = [torch.randn(3, 5, 33), torch.randn(33), torch.randn(3, 5, 33)]
    assert_as_good_as_torch(ours, formula, inputs, dtype)
