"""AdamW with stochastic rounding: torch's AdamW where nothing is rounded, right on average where something is."""

import math

import pytest
import torch
from device_kit import DEVICE
from ops_kit import both

from hasten.ops.adamw import AdamWConfig, adamw_, key_of, parts_of, reference

CONFIG = AdamWConfig(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=1)


def drawn(count: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    """(weight, gradient, moments) of `count` elements."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(count, generator=generator) for _ in range(4)]
    made[3] = made[3].square()
    return [x.to(DEVICE, dtype) for x, dtype in zip(made, dtypes, strict=True)]


@both
def test_in_fp32_it_is_torchs(backend: str) -> None:
    weight, grad = drawn(4321, *[torch.float32] * 4)[:2]
    theirs = weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=CONFIG.lr, weight_decay=CONFIG.weight_decay)
    moments = (torch.zeros_like(weight), torch.zeros_like(weight))
    for step in range(1, 6):
        theirs.grad = grad * math.cos(step)
        optimizer.step()
        config = AdamWConfig(CONFIG.lr, 0.9, 0.999, 1e-8, CONFIG.weight_decay, step)
        adamw_(weight, theirs.grad, moments, config, key=step, backend=backend)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(weight, theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[0], optimizer.state[theirs]["exp_avg"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[1], optimizer.state[theirs]["exp_avg_sq"], rtol=1e-6, atol=1e-6)


@both
def test_on_average_it_is_the_fp32_step(backend: str) -> None:
    """4096 roundings of each of 64 updates, all of them to one of the two neighbours, and their mean in between."""
    few = drawn(64, *[torch.bfloat16] * 4)
    exact = [x.float() for x in few]
    adamw_(exact[0], exact[1], (exact[2], exact[3]), CONFIG, key=0)
    many = [x.repeat_interleave(4096) for x in few]
    adamw_(many[0], many[1], (many[2], many[3]), CONFIG, key_of(1, 2), backend)  # pyright: ignore[reportArgumentType]
    for index in (0, 2, 3):
        wanted, found = exact[index], many[index].view(64, 4096).float()
        low, high = found.min(1).values, found.max(1).values
        step = wanted.abs() * 2**-7
        assert bool(((low <= wanted) & (wanted <= high) & (high - low <= step)).all())
        assert bool(((found == low[:, None]) | (found == high[:, None])).all())
        error = (found.mean(1) - wanted).abs() / (high - low).clamp(min=1e-9)
        assert float(error[high > low].max()) < 4.5 * 0.5 / 64, "within 4.5 standard deviations of 4096 draws"


@both
def test_weight_and_moments_are_rounded_independently_of_each_other(backend: str) -> None:
    for third in (2, 3):
        values = [torch.full((2**16,), 1.0, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
        values[1] = values[1] * 1.5  # every result lies between two bf16 numbers
        adamw_(values[0], values[1], (values[2], values[3]), CONFIG, key=9, backend=backend)  # pyright: ignore[reportArgumentType]
        up = [(x == x.max()).float() for x in (values[0], values[third])]
        assert all(0.001 < float(x.mean()) < 0.999 for x in up)
        assert abs(float(torch.corrcoef(torch.stack(up))[0, 1])) < 0.03


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 2049])
@pytest.mark.parametrize("halves", [(1, 1, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1), (1, 0, 1, 0)])
def test_kernel_and_reference_draw_the_same_bits(count: int, halves: tuple[int, ...]) -> None:
    dtypes = [torch.bfloat16 if half else torch.float32 for half in halves]
    results = []
    for backend in ("reference", "triton"):
        w, g, m, v = drawn(count, *dtypes)
        adamw_(w, g, (m, v), CONFIG, key_of(5, 6, 7), backend)
        results.append((w, m, v))
    for mine, theirs in zip(*results, strict=True):
        if mine.dtype == torch.float32:
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        else:  # the last bit of fp32, of which roots and fused products are free, rarely decides a draw
            assert int((mine != theirs).sum()) <= count // 500
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-7, atol=1e-6)


@both
def test_what_is_no_number_stays_none(backend: str) -> None:
    bits = [0x7FFFFFFF, 0x7FC00000, 0x7F800000, -0x800000, 0x7F7FFFFF, 0]
    grad = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(DEVICE)
    weight, *moments = (torch.zeros(6, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    adamw_(weight, grad, tuple(moments), CONFIG, key=1, backend=backend)  # pyright: ignore[reportArgumentType]
    assert bool(weight[:4].isnan().all()) and bool(moments[0][:2].isnan().all()) and weight[5] == 0
    assert bool((moments[0][2:4].abs() == math.inf).all())


def test_chunks_change_no_bit() -> None:
    whole = drawn(3000, *[torch.bfloat16] * 4)
    pieces = [x.clone() for x in whole]
    for chunk, (w, g, m, v) in ((3000, whole), (7, pieces)):
        reference.adamw_(w, g, (m, v), CONFIG.factors(), (4, 5), chunk)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_parts_of_a_large_tensor_are_rounded_apart() -> None:
    same = [torch.full((2, 1250), 1.001).bfloat16() for _ in range(4)]
    parts = [(part, key) for part, key in parts_of(same, 4, 1000)]
    assert [len(part[0]) for part, _ in parts] == [1000, 1000, 500] and len({key for _, key in parts}) == 3
    for (w, g, m, v), key in parts:
        reference.adamw_(w, g, (m, v), CONFIG.factors(), (key, key + 1))
    weight = same[0].view(-1)
    assert not torch.equal(weight[:1000], weight[1000:2000])
    ((_, key),) = parts_of(same, 4)
    assert key == parts[0][1] == 4, "a tensor of one part keeps its key"


def test_keys_tell_numbers_apart() -> None:
    keys = {key_of(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(keys) > 7990 and key_of(1 << 40) != key_of(0) and key_of(-1) != key_of(0)


def test_other_dtypes_shapes_and_strides_are_refused() -> None:
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="bf16 or fp32"):
        adamw_(x.half(), x, (x, x), CONFIG, key=0)
    with pytest.raises(ValueError, match="one shape"):
        adamw_(x, x[0], (x, x), CONFIG, key=0)
    with pytest.raises(ValueError, match="contiguous"):
        adamw_(torch.zeros(4, 8)[:, ::2], x, (x, x), CONFIG, key=0)
