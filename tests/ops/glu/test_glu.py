"""Gated activations against their formulas in fp64, and their names against transformers."""

from typing import Any

import pytest
import torch
from ops_kit import DTYPES, assert_as_good_as_torch, both

from hasten.ops import glu
from hasten.ops.glu import ACTIVATIONS


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_glu(dtype: torch.dtype, activation: str, backend: Any) -> None:
    formulas = {
        "silu": lambda g: g * torch.sigmoid(g),
        "gelu": lambda g: g * 0.5 * (1 + torch.erf(g / 2**0.5)),
        "gelu_pytorch_tanh": lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
        "relu": lambda g: g.clamp(min=0),
    }
    inputs = [torch.randn(3, 33) * 2, torch.randn(3, 33)]
    assert_as_good_as_torch(
        lambda g, u: glu(g, u, activation, backend), lambda g, u: formulas[activation](g) * u, inputs, dtype
    )


def test_glu_names_are_transformers_names() -> None:
    from transformers.activations import ACT2FN

    x = torch.randn(100)
    for name in ACTIVATIONS:
        torch.testing.assert_close(glu(x, torch.ones(100), name), ACT2FN[name](x))
    with pytest.raises(KeyError):
        glu(x, x, "no_such_activation")
