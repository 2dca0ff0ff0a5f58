"""LoRA linears and the LoRA MLP: outputs and every gradient against autograd over the formula, on both backends."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hasten.ops.lora import LoraLinear, lora_linears, lora_mlp
from hasten.testing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize("backend", ["reference", "triton"])
WIDTH, RANK = 24, 4


class Dense:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)


def linear(out: int, width: int, lora: bool, bias: bool, dtype: torch.dtype) -> LoraLinear:
    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.3).to(DEVICE, dtype)

    pair = (
        {"a": draw(RANK, width).requires_grad_(), "b": draw(out, RANK).requires_grad_(), "scale": 0.5} if lora else {}
    )
    return LoraLinear(Dense(draw(out, width)), draw(out) if bias else None, **pair)


def formula(x: torch.Tensor, one: LoraLinear) -> torch.Tensor:
    weight = one.weight.dense(x.dtype)
    if one.a is not None and one.b is not None:
        weight = weight + one.scale * one.b.to(x.dtype) @ one.a.to(x.dtype)
    return F.linear(x, weight, None if one.bias is None else one.bias.to(x.dtype))


def gradients(outputs: Any, x: torch.Tensor, linears: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    wanted = [x, *(t for one in linears for t in (one.a, one.b) if t is not None)]
    return list(torch.autograd.grad(total, wanted))  # pyright: ignore[reportArgumentType]


@both
@pytest.mark.parametrize("loras", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_linears(backend: Any, loras: tuple[bool, ...], bias: bool) -> None:
    linears = [linear(out, WIDTH, lora, bias, torch.float32) for out, lora in zip((32, 16, 8), loras, strict=True)]
    x = torch.randn(2, 5, WIDTH, device=DEVICE, requires_grad=True)
    ours = lora_linears(x, linears, backend=backend)
    theirs = [formula(x, one) for one in linears]
    for mine, expected in zip(ours, theirs, strict=True):
        assert relative_error(mine, expected) < 2e-6
    for mine, expected in zip(gradients(ours, x, linears), gradients(theirs, x, linears), strict=True):
        assert mine.shape == expected.shape and relative_error(mine, expected) < 2e-6


@both
@pytest.mark.parametrize(
    "loras", [(True, True, True), (False, True, False), (False, False, True), (False, False, False)]
)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_mlp(backend: Any, loras: tuple[bool, ...], activation: str) -> None:
    gate, up = (linear(40, WIDTH, lora, False, torch.float32) for lora in loras[:2])
    down = linear(WIDTH, 40, loras[2], False, torch.float32)
    linears = (gate, up, down)
    x = torch.randn(2, 5, WIDTH, device=DEVICE, requires_grad=True)
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    ours = lora_mlp(x, linears, activation, backend=backend)
    theirs = formula(act(formula(x, gate)) * formula(x, up), down)
    assert relative_error(ours, theirs) < 2e-6
    for mine, expected in zip(gradients([ours], x, linears), gradients([theirs], x, linears), strict=True):
        assert mine.shape == expected.shape and relative_error(mine, expected) < 3e-6


@both
def test_mlp_in_bf16_is_as_good_as_torch(backend: Any) -> None:
    linears = (
        *(linear(64, WIDTH, True, False, torch.bfloat16) for _ in range(2)),
        linear(WIDTH, 64, True, False, torch.bfloat16),
    )
    x = torch.randn(7, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()

    def chain(x: torch.Tensor) -> torch.Tensor:
        return formula(F.silu(formula(x, linears[0])) * formula(x, linears[1]), linears[2])

    exact, low, ours = chain(exact_x), chain(x), lora_mlp(x, linears, "silu", backend=backend)
    assert relative_error(ours, exact) <= 2 * relative_error(low, exact) + 1e-2
    results = [gradients([out], v, linears) for out, v in ((exact, exact_x), (low, x), (ours, x))]
    for reference, torchs, hastens in zip(*results, strict=True):
        assert hastens.dtype == torchs.dtype
        assert relative_error(hastens, reference) <= 2 * relative_error(torchs, reference) + 1e-2


@both
def test_a_second_backward_through_overwritten_buffers_is_refused(backend: Any) -> None:
    linears = (
        linear(40, WIDTH, True, False, torch.float32),
        linear(40, WIDTH, True, False, torch.float32),
        linear(WIDTH, 40, True, False, torch.float32),
    )
    x = torch.randn(5, WIDTH, device=DEVICE, requires_grad=True)
    out = lora_mlp(x, linears, "silu", backend=backend)
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    if backend == "triton":
        with pytest.raises(RuntimeError, match="ran already"):
            torch.autograd.grad(out.sum(), x)
    else:
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], first)


@both
def test_a_residual_is_added_and_gets_its_gradient(backend: Any) -> None:
    one = linear(WIDTH, WIDTH, True, True, torch.float32)
    mlp = (
        linear(40, WIDTH, True, False, torch.float32),
        linear(40, WIDTH, True, False, torch.float32),
        linear(WIDTH, 40, True, False, torch.float32),
    )
    x, residual = (torch.randn(2, 5, WIDTH, device=DEVICE, requires_grad=True) for _ in range(2))
    pairs = [
        (lora_linears(x, [one], residual, backend)[0], residual + formula(x, one)),
        (
            lora_mlp(x, mlp, "silu", residual, backend),
            residual + formula(F.silu(formula(x, mlp[0])) * formula(x, mlp[1]), mlp[2]),
        ),
    ]
    for ours, theirs in pairs:
        assert relative_error(ours, theirs) < 2e-6
        upstream = torch.randn_like(ours)
        mine, expected = (torch.autograd.grad(out, [x, residual], upstream) for out in (ours, theirs))
        assert relative_error(mine[0], expected[0]) < 2e-6 and relative_error(mine[1], expected[1]) < 2e-6


@pytest.mark.parametrize("ranks", [(4, 4), (3, 20), (16, 1)])
def test_mlp_with_two_ranks_and_odd_widths(ranks: tuple[int, int]) -> None:
    def odd(out: int, width: int, rank: int) -> LoraLinear:
        draw = [(torch.randn(*s) * 0.3).to(DEVICE) for s in ((out, width), (rank, width), (out, rank))]
        return LoraLinear(Dense(draw[0]), None, draw[1].requires_grad_(), draw[2].requires_grad_(), 0.7)

    mlp = (odd(150, WIDTH, ranks[0]), odd(150, WIDTH, ranks[1]), odd(WIDTH, 150, 4))
    x = torch.randn(37, WIDTH, device=DEVICE, requires_grad=True)
    ours = lora_mlp(x, mlp, "silu", backend="triton")
    theirs = formula(F.silu(formula(x, mlp[0])) * formula(x, mlp[1]), mlp[2])
    assert relative_error(ours, theirs) < 2e-6
    for mine, expected in zip(gradients([ours], x, mlp), gradients([theirs], x, mlp), strict=True):
        assert relative_error(mine, expected) < 3e-6
