"""The rotary embedding and the norm of queries and keys, against multiplication of complex numbers in fp64."""

from typing import Any

import pytest
import torch
from device_kit import DEVICE
from ops_kit import DTYPES, assert_as_good_as_torch, both
from torch.nn import functional as F

from hasten.ops import NormConfig, QKNorm, qk_rope


def _rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5) * w


def complex_rotation(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotation as multiplication of complex numbers: independent of how the reference pairs channels."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", ["half", "interleaved"])
@pytest.mark.parametrize("fp32", [False, True])
def test_qk_rope(dtype: torch.dtype, rotation: str, fp32: bool, backend: Any) -> None:
    q, k = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16)
    angles = torch.arange(7)[None, :, None] * torch.rand(8)[None, None]
    doubled = angles.repeat_interleave(2, -1) if rotation == "interleaved" else torch.cat((angles, angles), -1)

    def ours(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        tables = (doubled.cos().to(q), doubled.sin().to(q))
        return torch.cat(qk_rope(q, k, tables, rotation, fp32, backend=backend), dim=2)  # pyright: ignore[reportArgumentType]

    def formula(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.cat([complex_rotation(x, angles[:, :, None], rotation == "interleaved") for x in (q, k)], dim=2)

    assert_as_good_as_torch(ours, formula, [q, k], dtype)


def test_qk_rope_without_positions_returns_its_inputs_and_norms_first() -> None:
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8)
    same_q, same_k = qk_rope(q, k, None)
    assert same_q is q and same_k is k
    weights = QKNorm(torch.randn(8), torch.randn(8), NormConfig(1e-6))
    normed_q, normed_k = qk_rope(q, k, None, qk_norm=weights)
    torch.testing.assert_close(normed_q, _rms(q, weights.q_weight), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed_k, _rms(k, weights.k_weight), atol=1e-4, rtol=1e-4)


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "heads"), [("rms", False), ("layer", True)])
def test_qk_rope_with_norms(dtype: torch.dtype, kind: Any, heads: bool, backend: Any) -> None:
    """Both weight shapes and both kinds; the weights get gradients too."""
    q, k = torch.randn(2, 7, 4, 16) * 3, torch.randn(2, 7, 2, 16) * 3
    weights = [torch.randn((x.shape[2], 16) if heads else (16,)) for x in (q, k)]
    angles = torch.arange(7)[None, :, None] * torch.rand(8)[None, None]

    def ours(q: torch.Tensor, k: torch.Tensor, w_q: torch.Tensor, w_k: torch.Tensor) -> torch.Tensor:
        doubled = torch.cat((angles, angles), -1)
        tables = (doubled.cos().to(q), doubled.sin().to(q))
        fused = qk_rope(q, k, tables, qk_norm=QKNorm(w_q, w_k, NormConfig(1e-5, kind, True, True)), backend=backend)
        return torch.cat(fused, dim=2)

    def formula(q: torch.Tensor, k: torch.Tensor, w_q: torch.Tensor, w_k: torch.Tensor) -> torch.Tensor:
        normalise = F.rms_norm if kind == "rms" else F.layer_norm
        normed = [normalise(x, x.shape[-1:], eps=1e-5) * (1 + w) for x, w in ((q, w_q), (k, w_k))]
        return torch.cat([complex_rotation(x, angles[:, :, None], False) for x in normed], dim=2)

    assert_as_good_as_torch(ours, formula, [q, k, *weights], dtype)


@pytest.mark.parametrize("fp32", [False, True])
def test_a_16_bit_rotation_rounds_where_torch_does(fp32: bool) -> None:
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts bf16 off instead of rounding
    q, k = (torch.randn(2, 7, heads, 16, device=DEVICE).to(kind) for heads in (4, 2))
    table = tuple(torch.randn(1, 7, 8, device=DEVICE).repeat(1, 1, 2).to(kind) for _ in range(2))
    upstream = [torch.randn_like(x) for x in (q, k)]
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        outs = qk_rope(*leaves, table, fp32=fp32, backend=backend)
        found.append((*outs, *torch.autograd.grad(outs, leaves, upstream)))
    for index, (mine, torchs) in enumerate(zip(*found, strict=True)):
        if index < 2 or not fp32:  # in fp32, torch's backward rounds once more
            assert torch.equal(mine, torchs)
