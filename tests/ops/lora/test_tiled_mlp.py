"""The tiled MLP: its output and every gradient, what it saves, and what it recomputes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from lora_kit import DEVICE, WIDTH, everything, formula, linear, trained
from ops_kit import DTYPES, NORM, both, poisoned_memory
from product_kit import Products
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hasten.ops import NormConfig, NormInput, norm
from hasten.ops.lora import DenseWeight, LoraLinear, Weight, lora_mlp
from hasten.ops.nf4 import NF4Weight
from hasten.testing import relative_error
from hasten.weights.formats.nf4 import PackedWeight

INNER = 72
MLP = tuple[LoraLinear, LoraLinear, LoraLinear]
SHAPES = ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))


def packed(out: int, width: int) -> PackedWeight:
    import bitsandbytes.functional as bnb

    dense = (torch.randn(out, width) * 0.3).to(DEVICE)
    codes, state = bnb.quantize_4bit(dense, blocksize=64, compress_statistics=False, quant_type="nf4")
    return PackedWeight(NF4Weight(codes, state.code, (out, width), state.absmax, block=64))


def mlp_of(kind: str, dtype: torch.dtype) -> MLP:
    if kind.startswith("trained"):
        gate, up, down = (trained(*shape, "bias" in kind) for shape in SHAPES)
        made = [
            replace(one, weight=DenseWeight(leaf(one.weight.stored, dtype)), bias=leaf(one.bias, dtype))
            for one in (gate, up, down)
        ]
        return made[0], made[1], made[2]
    loras = {"plain": (False, False, False), "up alone": (False, True, False)}.get(kind, (True, True, True))
    made = [linear(*shape, lora, "bias" in kind, dtype) for shape, lora in zip(SHAPES, loras, strict=True)]
    if kind == "nf4":
        made = [replace(one, weight=packed(*one.weight.shape)) for one in made]
    return made[0], made[1], made[2]


def leaf(t: torch.Tensor | None, dtype: torch.dtype) -> Any:
    return None if t is None else t.detach().to(dtype).requires_grad_()


def gated(x: torch.Tensor, mlp: MLP, residual: torch.Tensor | None) -> torch.Tensor:
    """The MLP written out, in x's dtype."""
    out = formula(F.silu(formula(x, mlp[0])) * formula(x, mlp[1]), mlp[2])
    return out if residual is None else residual + out


def source_of(norm_kind: str | None, dtype: torch.dtype) -> tuple[torch.Tensor, NormInput | None]:
    """x (2, 7, WIDTH), a leaf, and the input of the norm that produced it."""
    hidden, weight = torch.randn(2, 7, WIDTH, device=DEVICE).to(dtype), torch.randn(WIDTH, device=DEVICE).to(dtype)
    if norm_kind is None:
        return hidden.requires_grad_(), None
    rules = {
        "rms, Llama's casts": NormInput(hidden, weight, NORM),
        "rms, Gemma's casts": NormInput(hidden, weight, NormConfig(1e-5, "rms", True, True)),
        "layer": NormInput(hidden, weight, NormConfig(1e-5, "layer", False, True)),
    }
    return rules[norm_kind].recompute().requires_grad_(), rules[norm_kind]


def results(
    run: Callable[..., torch.Tensor], x: torch.Tensor, residual: torch.Tensor | None, mlp: MLP
) -> list[torch.Tensor]:
    """The output and every gradient, for one upstream gradient."""
    out = run(x, residual)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    wanted = [x, *([] if residual is None else [residual]), *everything(mlp)]
    return [out, *torch.autograd.grad(out, wanted, upstream)]


def assert_as_good(
    mlp: MLP, x: torch.Tensor, residual: torch.Tensor | None, norm_input: NormInput | None, tile: int, backend: Any
) -> None:
    """err(tiled, fp64) <= 2 x err(torch at the same dtype, fp64) + a rounding, for the output and every gradient."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, residual)]
    exact = results(lambda x, r: gated(x, mlp, r), wide[0], wide[1], mlp)  # pyright: ignore[reportArgumentType]
    low = results(lambda x, r: lora_mlp(x, mlp, "silu", r, backend="reference"), x, residual, mlp)
    with poisoned_memory():
        mine = results(lambda x, r: lora_mlp(x, mlp, "silu", r, norm_input, tile, backend), x, residual, mlp)
    for index, (right, torchs, ours) in enumerate(zip(exact, low, mine, strict=True)):
        assert ours.shape == torchs.shape and ours.dtype == torchs.dtype
        limit = 2 * relative_error(torchs, right) + 2 * torch.finfo(x.dtype).eps
        assert relative_error(ours, right) <= limit, f"result {index}"


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("kind", ["lora", "lora, bias", "up alone", "plain", "trained", "trained, bias", "nf4"])
@pytest.mark.parametrize("tile", [4, 64])
def test_every_storage_of_weights(backend: Any, kind: str, tile: int) -> None:
    """14 tokens: three tiles of four and a partial one, or a single partial one."""
    mlp = mlp_of(kind, torch.float32)
    x, _ = source_of(None, torch.float32)
    residual = torch.randn_like(x).requires_grad_()
    assert_as_good(mlp, x, residual, None, tile, backend)


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_input", [None, "rms, Llama's casts", "rms, Gemma's casts", "layer"])
@pytest.mark.parametrize("onto", [True, False], ids=["onto a residual", "alone"])
def test_norms_and_dtypes(backend: Any, dtype: torch.dtype, norm_input: str | None, onto: bool) -> None:
    x, source = source_of(norm_input, dtype)
    residual = torch.randn_like(x).requires_grad_() if onto else None
    assert_as_good(mlp_of("lora", dtype), x, residual, source, 4, backend)


@both
def test_no_tokens(backend: Any) -> None:
    for kind in ("lora", "trained, bias"):
        mlp = mlp_of(kind, torch.float32)
        x = torch.empty(2, 0, WIDTH, device=DEVICE, requires_grad=True)
        out, dx, *rest = results(lambda x, r: lora_mlp(x, mlp, "silu", r, None, 4, backend), x, None, mlp)  # noqa: B023
        assert out.shape == dx.shape == x.shape
        for gradient, parameter in zip(rest, everything(mlp), strict=True):
            assert gradient.shape == parameter.shape and not gradient.any()


def test_an_input_without_gradient() -> None:
    mlp = mlp_of("lora", torch.float32)
    x = torch.randn(9, WIDTH, device=DEVICE)
    found = [
        torch.autograd.grad(lora_mlp(x, mlp, "silu", tile=tile, backend="triton").cos().sum(), everything(mlp))
        for tile in (None, 4)
    ]
    for whole, by_tiles in zip(*found, strict=True):
        assert relative_error(by_tiles, whole) < 2e-6


def test_a_weight_s_gradient_is_rounded_once() -> None:
    """In 16 bits, sums of 64 tiles would be off by many roundings."""
    mlp = mlp_of("trained, bias", torch.bfloat16)
    x = torch.randn(256, WIDTH, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    exact = results(lambda x, r: gated(x, mlp, r), x.detach().double().requires_grad_(), None, mlp)
    errors = []
    for tile in (None, 4):
        run = partial(lora_mlp, linears=mlp, activation="silu", tile=tile, backend="triton")
        mine = results(lambda x, r, run=run: run(x, residual=r), x, None, mlp)
        errors.append([relative_error(ours, right) for ours, right in zip(mine, exact, strict=True)])
    for whole, by_tiles in zip(*errors, strict=True):
        assert by_tiles <= 1.1 * whole


def test_the_backward_can_run_twice() -> None:
    mlp = mlp_of("lora", torch.float32)
    x = torch.randn(9, WIDTH, device=DEVICE, requires_grad=True)
    out = lora_mlp(x, mlp, "silu", tile=4, backend="triton")
    first = torch.autograd.grad(out.cos().sum(), [x, *everything(mlp)], retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(out.cos().sum(), [x, *everything(mlp)]), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("norm_input", [None, "layer"])
def test_only_the_input_is_saved(norm_input: str | None) -> None:
    x, source = source_of(norm_input, torch.float32)
    residual = torch.randn_like(x).requires_grad_()
    mlp = mlp_of("lora", torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = lora_mlp(x, mlp, "silu", residual, source, 4, "triton")
    assert out.requires_grad
    expected = [x] if source is None else [source.x, source.weight]
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in expected}


@dataclass
class Counted(Weight):
    """A dense weight that records how often it is dequantised."""

    stored: torch.Tensor = field()
    calls: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        self.calls.append("dense")
        return self.stored.to(dtype)

    def write(self, out: torch.Tensor) -> None:
        self.calls.append("write")
        out.copy_(self.stored)


def test_weights_are_dequantised_once_per_pass() -> None:
    weights = [Counted(torch.randn(*shape, device=DEVICE)) for shape in SHAPES]
    gate, up, down = (LoraLinear(weight) for weight in weights)
    x = torch.randn(14, WIDTH, device=DEVICE, requires_grad=True)
    out = lora_mlp(x, (gate, up, down), "silu", tile=4, backend="triton")
    assert [len(weight.calls) for weight in weights] == [1, 1, 1]
    out.sum().backward()
    assert [len(weight.calls) for weight in weights] == [2, 2, 2]


def test_a_checkpointed_layer_runs_the_mlp_s_forward_once() -> None:
    """The MLP's backward recomputes gate and up anyway; the checkpoint's recomputation stops before these matmuls."""
    gate_up, down = (WIDTH, 2 * INNER), (INNER, WIDTH)
    mlp = mlp_of("lora", torch.float32)
    hidden, weight = torch.randn(14, WIDTH, device=DEVICE, requires_grad=True), torch.ones(WIDTH, device=DEVICE)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        source = NormInput(hidden.detach(), weight, NORM)
        normed = norm(hidden, weight, NORM, "triton")
        return lora_mlp(normed, mlp, "silu", hidden, source, 4, "triton")

    found = []
    for run in (layer, partial(checkpoint, layer, use_reentrant=False)):
        with Products() as products:
            out: Any = run(hidden)
            assert products.rows(*gate_up) == products.rows(*down) == [4, 4, 4, 2]
            found.append([out, *torch.autograd.grad(out.cos().sum(), [hidden, *everything(mlp)])])
        assert products.rows(*gate_up) == [4, 4, 4, 2] * 2 and products.rows(*down) == [4, 4, 4, 2]
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)
