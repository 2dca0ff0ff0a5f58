"""Each op against an independent formula in fp64: output, every gradient, odd, strided and empty shapes, gradcheck."""

from typing import Any

import pytest
import torch
from ops_kit import DEVICE, DTYPES, NORM, assert_as_good_as_torch, both, poisoned_memory
from torch.nn import functional as F

from hasten.ops import NormConfig, QKNorm, add_norm, attend, glu, norm, norm_with_residual, qk_rope
from hasten.ops.glu import ACTIVATIONS


def rms_formula(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5) * w


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


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_shape", [(24,), (4, 24)])
def test_layer_norm_with_one_and_two_dimensional_weights(
    dtype: torch.dtype, weight_shape: tuple[int, ...], backend: Any
) -> None:
    inputs = [torch.randn(2, 5, 4, 24) * 3 + 1, torch.randn(weight_shape)]
    rule = NormConfig(1e-5, "layer", fp32_weight=True)
    formula = lambda x, w: F.layer_norm(x, x.shape[-1:], eps=1e-5) * w  # noqa: E731
    assert_as_good_as_torch(lambda x, w: norm(x, w, rule, backend), formula, inputs, dtype)


def complex_rotation(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotation as multiplication of complex numbers: independent of how the reference pairs channels."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


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


def test_qk_rope_without_positions_returns_its_inputs_and_norms_first() -> None:
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8)
    same_q, same_k = qk_rope(q, k, None)
    assert same_q is q and same_k is k
    weights = QKNorm(torch.randn(8), torch.randn(8), NormConfig(1e-6))
    normed_q, normed_k = qk_rope(q, k, None, qk_norm=weights)
    torch.testing.assert_close(normed_q, rms_formula(q, weights.q_weight), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed_k, rms_formula(k, weights.k_weight), atol=1e-4, rtol=1e-4)


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


@both
def test_nothing_is_left_unwritten(backend: Any) -> None:
    x = torch.randn(5, 3, 37, device=DEVICE, requires_grad=True)
    w = torch.randn(37, device=DEVICE, requires_grad=True)
    q = torch.randn(2, 3, 5, 6, device=DEVICE, requires_grad=True)
    head_weight = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    table = torch.randn(1, 3, 3, device=DEVICE).repeat(1, 1, 2)
    weights = QKNorm(head_weight, head_weight, NormConfig(1e-5, "layer", True, True))
    inputs = [x, w, q, head_weight]
    with poisoned_memory():
        outputs = [norm(x, w, NormConfig(1e-5, kind), backend) for kind in ("rms", "layer")]
        outputs += [
            *norm_with_residual(x, w, NORM, backend),
            add_norm(x, w, x, NORM, backend),
            glu(x, x * 2, "silu", backend),
        ]
        outputs += qk_rope(q, q * 2, (table, table), backend=backend)
        outputs += qk_rope(q, q * 2, (table, table), "interleaved", qk_norm=weights, backend=backend)
        for out in outputs:
            grads = torch.autograd.grad(out.sum(), inputs, allow_unused=True, retain_graph=True)
            for tensor in (out, *(g for g in grads if g is not None)):
                assert bool(tensor.isfinite().all())


@both
def test_strided_and_empty_inputs(backend: Any) -> None:
    base = torch.randn(6, 4, 40, device=DEVICE)
    strided, w = base.transpose(0, 1)[:, ::2, ::2], torch.randn(20, device=DEVICE)
    dense, empty = strided.contiguous(), torch.empty(0, 20, device=DEVICE)
    assert not strided.is_contiguous()
    torch.testing.assert_close(norm(strided, w, NORM, backend), norm(dense, w, NORM, "reference"))
    torch.testing.assert_close(glu(strided, strided, "silu", backend), glu(dense, dense, "silu", "reference"))
    halves = torch.randn(5, 2, 8, device=DEVICE).flatten(1).chunk(2, -1)
    torch.testing.assert_close(glu(*halves, "silu", backend), glu(*halves, "silu", "reference"))
    packed = torch.randn(2, 3, 8, 6, device=DEVICE)
    table = torch.randn(2, 3, 3, device=DEVICE).repeat(1, 1, 2)
    pair = packed[:, :, :5], packed[:, :, 5:7]
    for ours, expected in zip(
        qk_rope(*pair, (table, table), backend=backend),
        qk_rope(*pair, (table, table), backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
    assert norm(empty, w, NORM, backend).shape == (0, 20)
    assert glu(empty, empty, "silu", backend).shape == (0, 20)


def test_ops_leave_their_inputs_alone() -> None:
    x, w = torch.randn(2, 3, 4, 8), torch.randn(8)
    tables = (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    kept = [t.clone() for t in (x, w, *tables)]
    norm(x, w, NormConfig(1e-5, unit_offset=True))
    qk_rope(x, x, tables, qk_norm=QKNorm(w, w, NORM))
    glu(x, x, "silu")
    for now, before in zip((x, w, *tables), kept, strict=True):
        assert torch.equal(now, before)


def test_gradcheck() -> None:
    x, w = (
        torch.randn(2, 5, dtype=torch.double, requires_grad=True),
        torch.randn(5, dtype=torch.double, requires_grad=True),
    )
    for kind in ("rms", "layer"):
        rule = NormConfig(1e-5, kind, True, True)
        assert torch.autograd.gradcheck(lambda x, w: norm(x, w, rule), (x, w))  # noqa: B023
    q = torch.randn(1, 2, 2, 4, dtype=torch.double, requires_grad=True)
    tables = (torch.randn(1, 2, 4, dtype=torch.double), torch.randn(1, 2, 4, dtype=torch.double))
    for rotation in ("half", "interleaved"):
        assert torch.autograd.gradcheck(lambda q: qk_rope(q, q * 2, tables, rotation, True), (q,))  # noqa: B023
    assert torch.autograd.gradcheck(lambda q: attend(q, q, q, None, 0.5, 3.0)[0], (q,))


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
