"""LoRA linears and the LoRA MLP: outputs and every gradient against autograd over the formula, on both backends."""

from functools import partial
from typing import Any

import pytest
import torch
from lora_kit import DEVICE, WIDTH, everything, formula, linear, trained
from ops_kit import NORM, both
from torch.nn import functional as F

from hasten.ops import NormConfig, NormInput, QKNorm, norm, qk_rope
from hasten.ops.lora import DenseWeight, HeadsConfig, LoraLinear, lora_linears, lora_mlp, lora_qkv, stacked
from hasten.ops.lora.kernels.lora_delta import MIN_WIDTH_BACKWARD, add_lora_delta, lora_delta_bwd
from hasten.testing import relative_error
from hasten.weights import pack_weights


def gradients(outputs: Any, x: torch.Tensor, linears: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    total = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    wanted = [x, *(t for one in linears for t in (one.a, one.b) if t is not None)]
    return list(torch.autograd.grad(total, wanted))  # pyright: ignore[reportArgumentType]


@pytest.mark.grid(2)
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


@pytest.mark.grid(2)
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


@pytest.mark.parametrize("which", ["a", "b", "weight"])
@pytest.mark.parametrize("op", ["linear", "qkv", "mlp", "mlp in tiles"])
def test_a_weight_that_changes_before_the_backward_is_refused(op: str, which: str) -> None:
    mlp = (
        linear(40, WIDTH, True, False, torch.float32),
        linear(40, WIDTH, True, False, torch.float32),
        linear(WIDTH, 40, True, False, torch.float32),
    )
    x = torch.randn(5, WIDTH, device=DEVICE, requires_grad=True)
    tile = 2 if op == "mlp in tiles" else None

    def run() -> torch.Tensor:
        if op == "linear":
            return lora_linears(x, mlp[:1], backend="triton")[0]
        if op == "qkv":
            return lora_qkv(x[None], (mlp[0], mlp[0], mlp[1]), HeadsConfig(8), backend="triton")[0]
        return lora_mlp(x, mlp, "silu", tile=tile, backend="triton")

    out, one = run(), mlp[0]
    changed = one.weight.stored if which == "weight" else getattr(one, which)
    with torch.no_grad():
        changed.mul_(2)
    with pytest.raises(RuntimeError, match="in place|inplace"):
        out.sum().backward()
    run().sum().backward()


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
        (lora_linears(x, [one], residual, backend=backend)[0], residual + formula(x, one)),
        (
            lora_mlp(x, mlp, "silu", residual, backend=backend),
            residual + formula(F.silu(formula(x, mlp[0])) * formula(x, mlp[1]), mlp[2]),
        ),
    ]
    for ours, theirs in pairs:
        assert relative_error(ours, theirs) < 2e-6
        upstream = torch.randn_like(ours)
        mine, expected = (torch.autograd.grad(out, [x, residual], upstream) for out in (ours, theirs))
        assert relative_error(mine[0], expected[0]) < 2e-6 and relative_error(mine[1], expected[1]) < 2e-6


@pytest.mark.parametrize("ranks", [(4, 4), (3, 20), (16, 1), (40, 33), (70, 4)])
def test_mlp_with_two_ranks_and_odd_widths(ranks: tuple[int, int]) -> None:
    def odd(out: int, width: int, rank: int) -> LoraLinear:
        draw = [(torch.randn(*s) * 0.3).to(DEVICE) for s in ((out, width), (rank, width), (out, rank))]
        return LoraLinear(DenseWeight(draw[0]), None, draw[1].requires_grad_(), draw[2].requires_grad_(), 0.7)

    mlp = (odd(150, WIDTH, ranks[0]), odd(150, WIDTH, ranks[1]), odd(WIDTH, 150, 4))
    x = torch.randn(37, WIDTH, device=DEVICE, requires_grad=True)
    ours = lora_mlp(x, mlp, "silu", backend="triton")
    theirs = formula(F.silu(formula(x, mlp[0])) * formula(x, mlp[1]), mlp[2])
    assert relative_error(ours, theirs) < 2e-6
    for mine, expected in zip(gradients([ours], x, mlp), gradients([theirs], x, mlp), strict=True):
        assert relative_error(mine, expected) < 3e-6


@both
@pytest.mark.parametrize("bias", [False, True])
def test_weights_and_biases_that_train_get_their_gradients(backend: Any, bias: bool) -> None:
    linears = [trained(32, WIDTH, bias), trained(16, WIDTH, False), linear(8, WIDTH, True, False, torch.float32)]
    mlp = (trained(40, WIDTH, bias), trained(40, WIDTH, bias), trained(WIDTH, 40, bias))
    x = torch.randn(2, 5, WIDTH, device=DEVICE, requires_grad=True)
    ours = (*lora_linears(x, linears, backend=backend), lora_mlp(x, mlp, "silu", backend=backend))
    gated = F.silu(formula(x, mlp[0])) * formula(x, mlp[1])
    theirs = (*(formula(x, one) for one in linears), formula(gated, mlp[2]))
    upstream = [torch.randn_like(out) for out in theirs]
    wanted = [x, *everything(linears), *everything(mlp)]
    mine, expected = (torch.autograd.grad(outs, wanted, upstream) for outs in (ours, theirs))
    for got, right in zip(mine, expected, strict=True):
        assert got.shape == right.shape and got.dtype == right.dtype and relative_error(got, right) < 3e-6


HEADS = {
    "plain": {},
    "interleaved": {"rotation": "interleaved", "fp32": True},
    "normed": {"qk_norm": ("rms", (8,))},
    "normed per head, not rotated": {"qk_norm": ("layer", (4, 8)), "position": None},
    "as they are": {"position": None},
}


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("lora", [True, False])
def test_qkv(backend: Any, case: str, lora: bool) -> None:
    overlay_config = dict(HEADS[case])
    kind, shape = overlay_config.pop("qk_norm", (None, ()))
    table = torch.randn(1, 5, 4, device=DEVICE)
    table = table.repeat_interleave(2, -1) if "rotation" in overlay_config else table.repeat(1, 1, 2)
    position = overlay_config.pop("position", (table.cos(), table.sin()))
    qk_norm = None
    if kind is not None:
        weights = [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2)]
        qk_norm = QKNorm(*weights, NormConfig(1e-5, kind, False, kind == "layer"))  # pyright: ignore[reportArgumentType]
    linears = [linear(32, WIDTH, lora, True, torch.float32) for _ in range(2)]
    linears.append(linear(16, WIDTH, lora, False, torch.float32))
    x = torch.randn(2, 5, WIDTH, device=DEVICE, requires_grad=True)
    ours = lora_qkv(x, linears, HeadsConfig(8, position, qk_norm=qk_norm, **overlay_config), backend=backend)
    q, k, v = (formula(x, one).unflatten(-1, (-1, 8)) for one in linears)
    theirs = (*qk_rope(q, k, position, **overlay_config, qk_norm=qk_norm, backend="reference"), v)
    upstream = [torch.randn_like(out) for out in theirs]
    wanted = [x, *everything(linears), *([] if qk_norm is None else [qk_norm.q_weight, qk_norm.k_weight])]
    mine, expected = (torch.autograd.grad(outs, wanted, upstream) for outs in (ours, theirs))
    for got, right in zip((*ours, *mine), (*theirs, *expected), strict=True):
        assert got.shape == right.shape and relative_error(got, right) < 3e-6


def remember(kept: list[torch.Tensor], saved: torch.Tensor) -> torch.Tensor:
    kept.append(saved)
    return saved


def test_a_norm_s_output_is_recomputed_and_not_saved() -> None:
    hidden, weight = torch.randn(3, 7, WIDTH, device=DEVICE), torch.randn(WIDTH, device=DEVICE)
    source = NormInput(hidden, weight, NORM)
    mlp = (linear(40, WIDTH, True, False, torch.float32), linear(40, WIDTH, True, False, torch.float32))
    mlp = (*mlp, linear(WIDTH, 40, True, False, torch.float32))
    position = tuple(torch.randn(1, 7, 8, device=DEVICE) for _ in range(2))
    for run in (
        lambda x, m: lora_linears(x, mlp[:2], norm_input=m, backend="triton"),
        lambda x, m: lora_qkv(x, (*mlp[:2], mlp[0]), HeadsConfig(8, position), m, backend="triton"),  # pyright: ignore[reportArgumentType]
        lambda x, m: (lora_mlp(x, mlp, "silu", norm_input=m, backend="triton"),),
    ):
        results = []
        for norm_input in (None, source):
            normed = norm(hidden, weight, NORM, "triton").requires_grad_()
            kept: list[torch.Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(partial(remember, kept), lambda t: t):
                outs = run(normed, norm_input)
            assert (normed.data_ptr() in {t.data_ptr() for t in kept}) == (norm_input is None)
            total = sum((out * torch.arange(out.numel(), device=DEVICE).view(out.shape).cos()).sum() for out in outs)
            wanted = [normed, mlp[0].a, mlp[0].b, mlp[1].a]
            results.append(torch.autograd.grad(total, [t for t in wanted if t is not None]))
        for kept_gradient, made_gradient in zip(*results, strict=True):
            torch.testing.assert_close(kept_gradient, made_gradient)


def test_a_norm_with_an_fp32_weight_is_recomputed_in_the_dtype_of_the_matmul() -> None:
    hidden, weight = torch.randn(6, WIDTH, device=DEVICE).half(), torch.randn(WIDTH, device=DEVICE)
    one = linear(40, WIDTH, True, False, torch.float16)
    found = []
    for norm_input in (None, NormInput(hidden, weight, NORM)):
        normed = norm(hidden, weight, NORM, "triton")
        assert normed.dtype == torch.float32
        (out,) = lora_linears(normed.half().requires_grad_(), [one], norm_input=norm_input, backend="triton")
        found.append(torch.autograd.grad(out.float().cos().sum(), [one.a, one.b]))  # pyright: ignore[reportArgumentType]
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(kept, again)


def test_packed_weights_are_stacked_without_a_copy() -> None:
    modules = [torch.nn.Linear(WIDTH, out, bias=False, device=DEVICE) for out in (32, 16, 8)]
    before = [m.weight.detach().clone() for m in modules]
    parameters = [m.weight for m in modules]
    linears = [LoraLinear(DenseWeight(m.weight)) for m in modules]
    assert stacked.weight_of(linears, torch.float32).data_ptr() not in {w.data_ptr() for w in before + parameters}
    assert pack_weights(modules)
    assert all(m.weight is p and torch.equal(m.weight, w) for m, p, w in zip(modules, parameters, before, strict=True))
    whole = stacked.weight_of(linears, torch.float32)
    assert whole.data_ptr() == modules[0].weight.data_ptr() and torch.equal(whole, torch.cat(before))
    assert stacked.weight_of(linears[::-1], torch.float32).data_ptr() not in {p.data_ptr() for p in parameters}
    torch.testing.assert_close(stacked.weight_of(linears[::-1], torch.float32), torch.cat(before[::-1]))
    assert not pack_weights([*modules, torch.nn.Linear(WIDTH + 1, 4, device=DEVICE)])


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (70, 5), (130, 32)])
def test_wide_outputs_take_the_kernel_of_both_lora_gradients(rows: int, rank: int) -> None:
    wide = [MIN_WIDTH_BACKWARD, MIN_WIDTH_BACKWARD + 52, MIN_WIDTH_BACKWARD]
    linears = [linear(out, WIDTH, index != 2, False, torch.float32, rank) for index, out in enumerate(wide)]
    x = torch.randn(rows, WIDTH, device=DEVICE, requires_grad=True)
    ours = lora_linears(x, linears, backend="triton")
    theirs = [formula(x, one) for one in linears]
    for mine, expected in zip(gradients(ours, x, linears), gradients(theirs, x, linears), strict=True):
        assert mine.shape == expected.shape and relative_error(mine, expected) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_delta_launchers_write_their_outputs_and_nothing_else(dtype: torch.dtype) -> None:
    """Strided rows, odd sizes, a base of one expanded row; sums over several splits of the tokens."""
    wide = torch.randn(75, 410, device=DEVICE).to(dtype)
    base, xa, b = (
        wide[:, 100:401],
        torch.randn(75, 7, device=DEVICE).to(dtype),
        torch.randn(7, 301, device=DEVICE).to(dtype),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for start in (base, base[:1].expand(75, -1)):
        assert relative_error(add_lora_delta(start, xa, b), start.double() + xa.double() @ b.double()) < tolerance
    d_xa, d_b = lora_delta_bwd(base, xa, b, splits=3)
    assert relative_error(d_xa, base.double() @ b.double().T) < tolerance
    assert relative_error(d_b, base.double().T @ xa.double()) < tolerance
