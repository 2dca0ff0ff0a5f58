"""Edge cases of every op: no tokens, upstream gradients of any layout, a second device, and tensors of more than 2^31 elements,
checked at their beginning, middle and end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from ops_kit import NORM, both

from hasten.ops import (
    NormConfig,
    QKNorm,
    ScoreConfig,
    add_norm,
    glu,
    linear_cross_entropy,
    linear_cross_entropy_loss,
    norm,
    norm_with_residual,
    qk_rope,
)
from hasten.ops.lora.kernels.lora_delta import add_lora_delta, lora_delta_bwd
from hasten.ops.nf4 import NF4Weight, dequantize_nf4
from hasten.testing import relative_error

LIMIT = 2**31
HUGE_GIB = 40


def draw(*shape: int, device: Any = DEVICE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def nf4_weight(shape: tuple[int, int], device: Any = DEVICE) -> NF4Weight:
    """Random codes; any of them is a valid weight. The scales are doubly quantised."""
    count = shape[0] * shape[1]
    blocks = -(-count // 64)
    byte = lambda n: torch.randint(0, 256, (n,), device=device, dtype=torch.uint8)  # noqa: E731
    code, outer = torch.linspace(-1, 1, 16, device=device), torch.rand(-(-blocks // 256), device=device)
    scale_code, offset = torch.linspace(-1, 1, 256, device=device), torch.tensor(1.5, device=device)
    return NF4Weight(byte(-(-count // 2)), code, shape, byte(blocks), scale_code, outer, offset)


def calls(rows: int, device: Any, backend: Any) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor]]]:
    """Every op with gradients -> (a function of its inputs, the inputs), the same ones each time."""
    torch.manual_seed(3)
    heads, table = draw(1, rows, 4, 16, device=device), draw(1, rows, 8, device=device).repeat(1, 1, 2)
    labels = torch.arange(rows, device=device) % 11
    q_weight = draw(16, device=device)

    def rope(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> Any:
        return qk_rope(q, k, (table, table), qk_norm=QKNorm(w, w, NORM), backend=backend)

    return {
        "norm": (
            lambda x, w: norm(x, w, NORM, backend),
            [draw(rows, 40, device=device), draw(40, device=device)],
        ),
        "layer norm": (
            lambda x, w: norm_with_residual(x, w, NormConfig(1e-5, "layer"), backend),
            [draw(rows, 40, device=device), draw(40, device=device)],
        ),
        "norm onto": (
            lambda x, w, r: add_norm(x, w, r, NORM, backend),
            [draw(rows, 40, device=device), draw(40, device=device), draw(rows, 40, device=device)],
        ),
        "qk_rope": (rope, [heads, heads[:, :, :2] * 2, q_weight]),
        "glu": (
            lambda g, u: glu(g, u, "silu", backend),
            [draw(rows, 33, device=device), draw(rows, 33, device=device)],
        ),
        "scores": (
            lambda h, w: linear_cross_entropy(h, w, labels, ScoreConfig(), backend=backend).log_prob,
            [draw(rows, 16, device=device), draw(11, 16, device=device)],
        ),
        "loss": (
            lambda h, w: linear_cross_entropy_loss(h, w, labels, ScoreConfig(), 7.0, backend=backend)[None],
            [draw(rows, 16, device=device), draw(11, 16, device=device)],
        ),
    }


def results(
    op: Callable[..., Any], values: list[torch.Tensor], layout: Callable[[torch.Tensor], torch.Tensor]
) -> list[Any]:
    """Outputs and gradients; the upstream gradients come as `layout` lays them out."""
    leaves = [v.detach().clone().requires_grad_() for v in values]
    out = op(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [layout(torch.arange(o.numel(), device=o.device, dtype=o.dtype).view(o.shape) / 7 - 1) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, upstream)]


OPS = list(calls(1, "cpu", "reference"))


@both
@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op: str, backend: Any) -> None:
    found = results(*calls(0, DEVICE, backend)[op], layout=lambda g: g)
    expected = results(*calls(0, DEVICE, "reference")[op], layout=lambda g: g)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.numel() == 0 or float(mine.detach().abs().sum()) == 0.0


@both
@pytest.mark.parametrize("op", OPS)
def test_gradients_may_come_in_any_layout(op: str, backend: Any) -> None:
    """Transposed in memory, and expanded from one number, as the backward of `sum` gives them."""
    function, values = calls(6, DEVICE, backend)[op]
    plain = results(function, values, lambda g: g)
    for mine, expected in zip(
        results(function, values, lambda g: g.transpose(0, -1).contiguous().transpose(0, -1)), plain, strict=True
    ):
        torch.testing.assert_close(mine, expected)
    ones = results(function, values, torch.ones_like)
    for mine, expected in zip(results(function, values, lambda g: g.new_ones(()).expand_as(g)), ones, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", [*OPS, "nf4"])
def test_the_device_of_the_tensors_is_used(op: str) -> None:
    """All tensors are on the second GPU while the first one is current."""
    torch.cuda.set_device(0)
    if op == "nf4":
        weight = nf4_weight((6, 64), "cuda:1")
        found, expected = ([dequantize_nf4(weight, torch.float32, backend=b)] for b in ("triton", "reference"))
    else:
        found, expected = (results(*calls(6, "cuda:1", b)[op], lambda g: g) for b in ("triton", "reference"))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.device == torch.device("cuda:1")
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def room() -> None:
    """Skips where there is no GPU with 40 GiB free."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < HUGE_GIB * 2**30:
        pytest.skip(f"needs {HUGE_GIB} GiB of free GPU memory")


def thirds(rows: int) -> list[slice]:
    """The beginning, the middle and the end."""
    return [slice(0, 3), slice(rows // 2, rows // 2 + 3), slice(rows - 3, rows)]


def near(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Within a few roundings of 16 bits: torch rounds a rotation three times."""
    torch.testing.assert_close(ours.float(), reference.float(), rtol=2e-2, atol=6e-2)


def assert_slices_are_right(
    triton: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> None:
    """Output and gradients of a row-wise op."""
    leaves = [x.requires_grad_() for x in inputs]
    out = triton(*leaves)
    assert out.numel() > LIMIT
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream)
    for part in thirds(out.shape[0]):
        rows = [x.detach()[part].requires_grad_() for x in leaves]
        expected = reference(*rows)
        near(out[part], expected)
        for mine, theirs in zip(grads, torch.autograd.grad(expected, rows, upstream[part]), strict=True):
            near(mine[part], theirs)


@pytest.mark.gpu
def test_huge_norm(room: None) -> None:
    weight = draw(4096, dtype=torch.bfloat16)
    x = draw(600_000, 4096, dtype=torch.bfloat16)
    assert_slices_are_right(lambda x: norm(x, weight, NORM), lambda x: norm(x, weight, NORM, "reference"), [x])


@pytest.mark.gpu
def test_huge_norm_weight_gradient(room: None) -> None:
    """A gradient summed over all rows: only rows beyond 2^31 elements have a nonzero upstream gradient."""
    x, weight = draw(530_000, 4096, dtype=torch.bfloat16), draw(4096).requires_grad_()
    upstream = torch.zeros_like(x)
    upstream[-3:] = 1.0
    config = NormConfig(1e-5, fp32_weight=True)
    (found,) = torch.autograd.grad(norm(x, weight, config), weight, upstream)
    last = norm(x[-3:], weight, config, backend="reference")
    (expected,) = torch.autograd.grad(last, weight, upstream[-3:])
    near(found, expected)


@pytest.mark.gpu
def test_huge_glu(room: None) -> None:
    inputs = [draw(150_001, 14336, dtype=torch.bfloat16) for _ in range(2)]
    assert_slices_are_right(lambda g, u: glu(g, u, "silu"), lambda g, u: glu(g, u, "silu", "reference"), inputs)


@pytest.mark.gpu
def test_huge_qk_rope(room: None) -> None:
    """cos and sin are inputs here, so that they are sliced with the tokens; they get no gradient."""
    tokens = 530_000
    q, table = draw(1, tokens, 32, 128, dtype=torch.bfloat16), draw(1, tokens, 64, dtype=torch.bfloat16).repeat(1, 1, 2)

    def rotate(q: torch.Tensor, table: torch.Tensor, backend: Any = None) -> torch.Tensor:
        return qk_rope(q, q[:, :, :1].detach(), (table, table), backend=backend)[0]

    out = rotate(q.requires_grad_(), table)
    assert out.numel() > LIMIT
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, q, upstream)
    for part in thirds(tokens):
        rows = q.detach()[:, part].requires_grad_()
        expected = rotate(rows, table[:, part], "reference")
        near(out[:, part], expected)
        near(gradient[:, part], torch.autograd.grad(expected, rows, upstream[:, part])[0])


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [0, 64])
def test_huge_nf4(room: None, apart: int) -> None:
    """Rows of 16384 begin with a new scale of scales, so single rows can be sliced out."""
    rows, width = 131_080, 16384
    assert rows * width > LIMIT
    weight = nf4_weight((rows, width))
    out = torch.full((rows, width + apart), float("nan"), device=DEVICE, dtype=torch.bfloat16)[:, :width]
    dequantize_nf4(weight, torch.bfloat16, out)
    for part in thirds(rows):
        some = NF4Weight(
            weight.packed.view(rows, -1)[part], weight.code, (3, width), weight.scales.view(rows, -1)[part].flatten(),
            weight.scale_code, weight.scale_of_scales[part], weight.offset,  # pyright: ignore[reportOptionalSubscript]
        )  # fmt: skip
        near(out[part], dequantize_nf4(some, torch.bfloat16, backend="reference"))


@pytest.mark.gpu
def test_huge_chunk_of_logits(room: None) -> None:
    tokens, words = 16_800, 128_256
    assert tokens * words > LIMIT
    hidden, weight = draw(tokens, 64, dtype=torch.bfloat16), draw(words, 64, dtype=torch.bfloat16) * 0.1
    labels = torch.randint(0, words, (tokens,), device=DEVICE)
    found = []
    for backend, chunk in (("triton", tokens), ("reference", 1024)):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = linear_cross_entropy_loss(*leaves, labels, ScoreConfig(chunk=chunk), backend=backend)  # pyright: ignore[reportArgumentType]
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for mine, theirs in zip(*found, strict=True):
        assert relative_error(mine, theirs) < 1e-2


@pytest.mark.gpu
def test_huge_lora_delta(room: None) -> None:
    """More rows than a second grid axis could have programs for, and more than 2^31 elements."""
    rows, width, rank = 1_100_000, 2048, 16
    assert rows * width > LIMIT and rows / 16 > 65_535
    base, xa, b = (draw(*shape, dtype=torch.bfloat16) for shape in ((rows, width), (rows, rank), (rank, width)))
    out = add_lora_delta(base, xa, b)
    d_xa, d_b = lora_delta_bwd(base, xa, b)
    for part in thirds(rows):
        near(out[part], base[part].float() + xa[part].float() @ b.float())
        near(d_xa[part], base[part].float() @ b.float().T)
    some = base[:, :8].double().T @ xa.double()
    assert relative_error(d_b[:8], some) < 1e-3
