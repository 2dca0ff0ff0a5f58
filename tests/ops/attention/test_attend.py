"""Attention with materialised scores against a formula in fp64: grouped queries, masks of both kinds, softcap."""

import pytest
import torch
from device_kit import DEVICE
from ops_kit import DTYPES, assert_as_good_as_torch

from hasten.ops import attend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attend(dtype: torch.dtype, softcap: float | None) -> None:
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    visible = torch.ones(9, 9, dtype=torch.bool, device=DEVICE).tril()

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.unflatten(1, (2, 1)).expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (k, v))
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.where(visible, float("-inf")).softmax(-1)
        return torch.einsum("bhts,bhsd->bthd", weights, v)

    assert_as_good_as_torch(lambda *qkv: attend(*qkv, visible, 0.3, softcap)[0], formula, [q, k, v], dtype)
    additive = torch.zeros(1, 1, 9, 9).masked_fill(~visible.cpu(), torch.finfo(torch.float32).min)
    masks = additive, visible.cpu()
    outputs = [attend(q, k, v, mask, 0.3, softcap)[0] for mask in masks]
    torch.testing.assert_close(*outputs)
