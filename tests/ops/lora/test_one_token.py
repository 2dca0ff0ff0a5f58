"""One token without gradients: the matrix-vector kernels give what the matmuls give, for every kind of weight and adapter."""

import pytest
import torch
from device_kit import DEVICE
from lora_kit import formula, linear
from ops_kit import poisoned_memory, quantized

from hasten.ops.glu import ACTIVATIONS
from hasten.ops.lora import HeadsConfig, LoraLinear, is_one_token, lora_linears, lora_mlp, lora_qkv
from hasten.weights.formats.nf4 import PackedWeight

WIDTH = 64


def nf4(out: int, width: int, lora: bool, bias: bool) -> LoraLinear:
    dense = linear(out, width, lora, bias, torch.float32)
    return LoraLinear(PackedWeight(quantized((out, width), True)[0]), dense.bias, dense.a, dense.b, dense.scale)


def made(kind: str, out: int, width: int, lora: bool, bias: bool) -> LoraLinear:
    return nf4(out, width, lora, bias) if kind == "nf4" else linear(out, width, lora, bias, torch.float32)


KINDS = [("dense", "dense", "dense"), ("nf4", "nf4", "nf4"), ("dense", "nf4", "dense")]


@torch.no_grad()
@pytest.mark.parametrize("loras", [(False, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_linears(kinds: tuple[str, ...], loras: tuple[bool, ...]) -> None:
    found = [made(kind, out, WIDTH, lora, out == 16) for kind, out, lora in zip(kinds, (32, 16, 8), loras, strict=True)]
    x = torch.randn(1, 1, WIDTH, device=DEVICE)
    with poisoned_memory():
        ours = lora_linears(x, found, backend="triton")
    for mine, one in zip(ours, found, strict=True):
        assert mine.shape == (1, 1, one.weight.shape[0])
        torch.testing.assert_close(mine, formula(x, one), rtol=2e-5, atol=2e-5)
    residual = torch.randn(1, 1, 32, device=DEVICE)
    (added,) = lora_linears(x, found[:1], residual, backend="triton")
    torch.testing.assert_close(added, formula(x, found[0]) + residual, rtol=2e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_mlp(kinds: tuple[str, ...], lora: bool) -> None:
    sizes = ((128, WIDTH), (128, WIDTH), (WIDTH, 128))
    gate, up, down = (made(kind, *size, lora, False) for kind, size in zip(kinds, sizes, strict=True))
    x, residual = torch.randn(2, 1, WIDTH, device=DEVICE)
    with poisoned_memory():
        ours = lora_mlp(x, (gate, up, down), "silu", residual, backend="triton")
    inner = ACTIVATIONS["silu"](formula(x, gate)) * formula(x, up)
    torch.testing.assert_close(ours, formula(inner, down) + residual, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_qkv_are_rotated() -> None:
    found = [linear(out, WIDTH, True, True, torch.float32) for out in (32, 16, 16)]
    x = torch.randn(1, 1, WIDTH, device=DEVICE)
    angles = torch.rand(1, 1, 4, device=DEVICE).repeat(1, 1, 2)
    heads = HeadsConfig(8, (angles.cos(), angles.sin()))
    wanted = lora_qkv(x, found, heads, backend="reference")
    for mine, theirs in zip(lora_qkv(x, found, heads, backend="triton"), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)


def test_with_gradients_the_autograd_function_runs() -> None:
    """The kernels of one token have no backward."""
    one = linear(8, WIDTH, True, False, torch.float32)
    x = torch.randn(1, 1, WIDTH, device=DEVICE, requires_grad=True)
    lora_linears(x, [one], backend="triton")[0].sum().backward()
    assert x.grad is not None and one.a is not None and one.a.grad is not None
    with torch.no_grad():
        assert not is_one_token(torch.randn(2, 1, WIDTH))
