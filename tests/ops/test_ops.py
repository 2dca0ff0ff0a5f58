"""What holds for every elementwise op: all of the output is written, inputs stay, any strides, no elements, gradcheck."""

from typing import Any

import torch
from device_kit import DEVICE
from ops_kit import NORM, both, poisoned_memory

from hasten.ops import NormConfig, QKNorm, add_norm, attend, glu, norm, norm_with_residual, qk_rope


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
        config = NormConfig(1e-5, kind, True, True)
        assert torch.autograd.gradcheck(lambda x, w: norm(x, w, config), (x, w))  # noqa: B023
    q = torch.randn(1, 2, 2, 4, dtype=torch.double, requires_grad=True)
    tables = (torch.randn(1, 2, 4, dtype=torch.double), torch.randn(1, 2, 4, dtype=torch.double))
    for rotation in ("half", "interleaved"):
        assert torch.autograd.gradcheck(lambda q: qk_rope(q, q * 2, tables, rotation, True), (q,))  # noqa: B023
    assert torch.autograd.gradcheck(lambda q: attend(q, q, q, None, 0.5, 3.0)[0], (q,))
