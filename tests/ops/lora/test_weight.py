"""Weights with a matmul of their own: every op calls it, alone or beside other formats, and computes what it does with dense ones."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from lora_kit import DEVICE, WIDTH, everything, linear
from ops_kit import NORM, both, poisoned_memory

from hasten.ops import NormInput, norm
from hasten.ops.lora import DenseWeight, HeadsConfig, LoraLinear, Weight, lora_linears, lora_mlp, lora_qkv
from hasten.ops.matvec import Part
from hasten.testing import relative_error

TOKENS, INNER, TILE = 10, 40, 4


@dataclass(frozen=True)
class MinimalWeight(Weight):
    """Implements what a format must, and no more."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype)


@dataclass(frozen=True)
class OwnMatmul(MinimalWeight):
    """Records its matmuls, and cannot be dequantised."""

    calls: list[str] = field(default_factory=list)
    stored: torch.Tensor | None = None
    overrides_matmul = True

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("was asked for a dense copy")

    def matmul(self, x_NE: torch.Tensor, add_to: Any = None, out: Any = None) -> torch.Tensor:
        return self._run("matmul", x_NE @ self.values.T, add_to, out)

    def matmul_t(self, dy_NO: torch.Tensor, add_to: Any = None, out: Any = None) -> torch.Tensor:
        return self._run("matmul_t", dy_NO @ self.values, add_to, out)

    def _run(self, name: str, result: torch.Tensor, add_to: Any, out: Any) -> torch.Tensor:
        self.calls.append(name)
        result = result if add_to is None else result + add_to
        return result if out is None else out.copy_(result)


def own(dense: LoraLinear) -> LoraLinear:
    stored = dense.weight.stored
    assert stored is not None
    return replace(dense, weight=OwnMatmul(stored.detach(), stored=stored if stored.requires_grad else None))


def some(shapes: tuple[tuple[int, int], ...], lora: bool = True, bias: bool = False) -> list[LoraLinear]:
    return [linear(*shape, lora, bias, torch.float32) for shape in shapes]


def run(op: str, linears: list[LoraLinear], x: torch.Tensor, residual: torch.Tensor, backend: Any) -> tuple[Any, ...]:
    if op == "one":
        return lora_linears(x, linears, backend=backend)
    if op == "one, onto a residual":
        return lora_linears(x, linears, residual, backend=backend)
    if op == "three":
        return lora_linears(x, linears, backend=backend)
    if op == "qkv":
        table = torch.linspace(0, 1, TOKENS * 8, device=DEVICE).view(1, TOKENS, 8)
        return lora_qkv(x[None], linears, HeadsConfig(8, (table.cos(), table.sin())), backend=backend)
    tile = TILE if "tiles" in op else None
    return (lora_mlp(x, (linears[0], linears[1], linears[2]), "silu", residual, tile=tile, backend=backend),)


SHAPES = {
    "one": ((WIDTH, WIDTH),),
    "one, onto a residual": ((WIDTH, WIDTH),),
    "three": ((32, WIDTH), (16, WIDTH), (8, WIDTH)),
    "qkv": ((32, WIDTH), (16, WIDTH), (16, WIDTH)),
    "mlp": ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)),
    "mlp in tiles": ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)),
}


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(("lora", "bias"), [(True, False), (False, True), (False, False)])
def test_outputs_and_gradients_equal_the_dense_ones(
    op: str, which: tuple[int, ...], lora: bool, bias: bool, backend: Any
) -> None:
    dense = some(SHAPES[op], lora, bias)
    mixed = [own(one) if index in which or len(dense) == 1 else one for index, one in enumerate(dense)]
    x, residual = (torch.randn(TOKENS, WIDTH, device=DEVICE, requires_grad=True) for _ in range(2))
    found = []
    for linears in (dense, mixed):
        with poisoned_memory():
            outs = run(op, linears, x, residual, backend)
        upstream = [torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) for out in outs]
        wanted = [x, *([residual] if "residual" in op or "mlp" in op else []), *everything(linears)]
        found.append([*outs, *torch.autograd.grad(outs, wanted, upstream)])
    for mine, expected in zip(found[1], found[0], strict=True):
        assert mine.shape == expected.shape and relative_error(mine, expected) < 3e-6
    for one in mixed:
        if isinstance(one.weight, OwnMatmul):
            assert set(one.weight.calls) == {"matmul", "matmul_t"}


def test_a_weight_that_is_frozen_behind_a_frozen_input_computes_no_gradient_of_it() -> None:
    for backend in ("reference", "triton"):
        (one,) = map(own, some(((WIDTH, WIDTH),)))
        (out,) = lora_linears(torch.randn(TOKENS, WIDTH, device=DEVICE), [one], backend=backend)
        out.sum().backward()
        assert one.weight.calls == ["matmul"] and one.a is not None and one.a.grad is not None  # pyright: ignore[reportAttributeAccessIssue]


def test_each_tile_multiplies_once() -> None:
    linears = [own(one) for one in some(SHAPES["mlp in tiles"])]
    x = torch.randn(TOKENS, WIDTH, device=DEVICE, requires_grad=True)
    (out,) = run("mlp in tiles", linears, x, torch.zeros_like(x), "triton")
    calls = [one.weight.calls for one in linears]  # pyright: ignore[reportAttributeAccessIssue]
    assert calls == [["matmul"] * 3] * 3
    out.sum().backward()
    assert calls[2] == ["matmul"] * 3 + ["matmul_t"] * 3, "down's forward is not recomputed"
    assert sorted(calls[0]) == sorted(calls[1]) == ["matmul"] * 6 + ["matmul_t"] * 3


@both
def test_a_weight_that_trains_gets_its_gradient(backend: Any) -> None:
    """As fake quantisation does: the matmul is the format's, the gradient goes to the stored tensor."""
    x = torch.randn(TOKENS, WIDTH, device=DEVICE, requires_grad=True)
    dense = LoraLinear(DenseWeight(torch.randn(16, WIDTH, device=DEVICE).requires_grad_()))
    found = []
    for one in (dense, own(dense)):
        (out,) = lora_linears(x, [one], backend=backend)
        found.append([out, *torch.autograd.grad(out.cos().sum(), [x, *everything([one])])])
    assert len(found[0]) == 3
    for mine, expected in zip(found[1], found[0], strict=True):
        assert relative_error(mine, expected) < 3e-6


def test_with_a_norm_that_is_recomputed() -> None:
    source, scale = torch.randn(TOKENS, WIDTH, device=DEVICE), torch.randn(WIDTH, device=DEVICE)
    x = norm(source, scale, NORM, "triton").requires_grad_()
    dense = some(SHAPES["three"])
    found = []
    for linears in (dense, [own(dense[0]), dense[1], own(dense[2])]):
        outs = lora_linears(x, linears, norm_input=NormInput(source, scale, NORM), backend="triton")
        found.append(torch.autograd.grad(sum(out.cos().sum() for out in outs), [x, *everything(linears)]))  # pyright: ignore[reportArgumentType]
    for mine, expected in zip(found[1], found[0], strict=True):
        assert relative_error(mine, expected) < 3e-6


@pytest.mark.parametrize("kind", [MinimalWeight, DenseWeight])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_defaults(kind: Any, dtype: torch.dtype) -> None:
    values, x, dy = (torch.randn(s, device=DEVICE).to(dtype) for s in ((6, 5), (7, 5), (7, 6)))
    weight: Weight = kind(values)
    assert not weight.overrides_matmul and (weight.stored is None) == (kind is MinimalWeight)
    torch.testing.assert_close(kind.matvecs([Part(weight)], x[0]), values @ x[0])
    bias, residual = torch.randn(2, 6, device=DEVICE).to(dtype)
    torch.testing.assert_close(
        kind.matvecs([Part(weight, bias)], x[0], None, residual), values @ x[0] + bias + residual
    )
    for function, left, product in ((weight.matmul, x, x @ values.T), (weight.matmul_t, dy, dy @ values)):
        base = torch.randn_like(product)
        torch.testing.assert_close(function(left), product)
        torch.testing.assert_close(function(left, base[:1].expand_as(product)), base[:1] + product)
        wide = torch.full((7, 20), float("nan"), device=DEVICE, dtype=dtype)
        out = wide[:, 3 : 3 + product.shape[1]]
        assert function(left, out=out) is out
        torch.testing.assert_close(out, product)
        kept = base.clone()
        function(left, base, out)
        assert torch.equal(base, kept), "wrote into the caller's tensor"
        torch.testing.assert_close(out, torch.addmm(base, left, values.T if left is x else values))
        assert function(left, base, base) is base
        torch.testing.assert_close(base, out)
        assert int(wide.isnan().sum()) == 7 * (20 - product.shape[1])
    target = torch.empty(6, 5, device=DEVICE, dtype=torch.float64)
    weight.write(target)
    assert torch.equal(target, values.double())


def test_one_token_takes_the_own_matmul() -> None:
    weight = OwnMatmul(torch.randn(6, 5, device=DEVICE))
    x = torch.randn(5, device=DEVICE)
    torch.testing.assert_close(OwnMatmul.matvecs([Part(weight)], x), weight.values @ x)
    assert weight.calls == ["matmul"]


def test_a_format_must_say_its_shape_its_device_and_its_values() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Weight()  # pyright: ignore[reportAbstractUsage]
    with pytest.raises(TypeError, match="stored"):
        DenseWeight()  # pyright: ignore[reportCallIssue]
