"""The training loss of the fused head: gradients computed in the forward are right for every upstream gradient, and nothing is
computed that is not needed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from ops_kit import DTYPES, assert_as_good_as_torch, both, poisoned_memory
from test_linear_cross_entropy import CONFIGS, TOKENS, WIDTH, WORDS, inputs, make_labels, raw_logits
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.ops import LoraHead, ScoreConfig, linear_cross_entropy, linear_cross_entropy_loss
from hasten.ops.linear_cross_entropy import OPTIONAL_SCORES, kernel, reference
from hasten.ops.linear_cross_entropy.function import SCORES, Upstream, tokens_at_once
from hasten.testing import relative_error


def loss_of(
    t: dict[str, torch.Tensor], backend: Any, config: ScoreConfig | None = None, denominator: Any = None
) -> torch.Tensor:
    lora = LoraHead(t["a"], t["b"], 0.5) if "a" in t else None
    config = ScoreConfig(chunk=8) if config is None else config
    labels = make_labels()
    if config.ignore_index != -100:
        labels = labels.where(labels != -100, config.ignore_index)
    return linear_cross_entropy_loss(
        t["hidden"], t["weight"], labels, config, denominator, t.get("bias"), lora, backend
    )


def formula(
    t: dict[str, torch.Tensor], config: ScoreConfig | None = None, denominator: float | None = None
) -> torch.Tensor:
    config = ScoreConfig() if config is None else config
    labels = make_labels()
    if config.ignore_index != -100:
        labels = labels.where(labels != -100, config.ignore_index)
    raw = raw_logits(t)
    z = (raw if raw.dtype == torch.float64 else raw.float()) * config.logit_scale
    z = (z if config.softcap is None else config.softcap * torch.tanh(z / config.softcap)) / config.temperature
    sums = F.cross_entropy(
        z, labels, ignore_index=config.ignore_index, label_smoothing=config.label_smoothing, reduction="none"
    )
    return sums.sum() / ((labels != config.ignore_index).sum() if denominator is None else denominator)


def gradients(loss: torch.Tensor, t: dict[str, torch.Tensor], **extra: Any) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(t.values()), **extra)


def assert_near(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], limit: float = 1e-5) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == expected.shape
        assert relative_error(mine, expected) < limit


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lora", "bias"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("denominator", [None, 300.0])
def test_as_good_as_torch(dtype: torch.dtype, lora: bool, bias: bool, denominator: float | None, backend: Any) -> None:
    t = inputs(torch.float32, lora, bias)

    def named(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *values: function(dict(zip(t, values, strict=True)))[None].to(values[0].dtype)

    assert_as_good_as_torch(
        named(lambda t: loss_of(t, backend, denominator=denominator)),
        named(lambda t: formula(t, denominator=denominator)),
        list(t.values()),
        dtype,
    )


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_is_not_written_reaches_no_gradient(dtype: torch.dtype, backend: Any) -> None:
    """torch's bf16 matmul on CPUs reads past the rows of a padded matrix; the vocabulary here is not a multiple of 8."""
    t = inputs(dtype, True, True)
    with poisoned_memory():
        found = gradients(loss_of(t, backend, denominator=300.0), t)
    assert all(gradient.isfinite().all() for gradient in found)


@both
@pytest.mark.parametrize("name", CONFIGS)
def test_every_rule(name: str, backend: Any) -> None:
    config = ScoreConfig(**CONFIGS[name], chunk=8)
    mine, exact = inputs(torch.float32, True, True), inputs(torch.float64, True, True)
    loss, expected = loss_of(mine, backend, config), formula(exact, config)
    assert relative_error(loss, expected) < 3e-6
    assert_near(gradients(loss, mine), gradients(expected, exact))


@both
def test_denominators_of_every_kind(backend: Any) -> None:
    t = inputs(torch.float32, False, False)
    expected = formula(t, denominator=50)
    kinds = [50, 50.0, torch.tensor(50), torch.tensor([50.0]), torch.tensor(50, device=DEVICE, dtype=torch.int32)]
    for denominator in kinds:
        loss = loss_of(t, backend, denominator=denominator)
        assert loss.shape == () and loss.dtype == torch.float32
        assert relative_error(loss, expected) < 1e-6
        assert_near(gradients(loss, t), gradients(expected, t, retain_graph=True))


@both
def test_scaled_repeated_and_shared(backend: Any) -> None:
    """A user's factor, a backward run twice, two losses over one hidden state, and gradients that accumulate."""
    t, exact = inputs(torch.float32, True, True), inputs(torch.float64, True, True)
    wanted = gradients(formula(exact), exact)
    loss = loss_of(t, backend)
    once = gradients(loss * -3.5, t, retain_graph=True)
    assert_near(once, tuple(-3.5 * g for g in wanted))
    assert_near(gradients(loss, t, retain_graph=True), wanted)
    assert_near(gradients(loss, t), wanted)
    both_losses = loss_of(t, backend) * 2 + loss_of(t, backend, ScoreConfig(logit_scale=0.5), 30)
    expected = formula(exact) * 2 + formula(exact, ScoreConfig(logit_scale=0.5), 30)
    assert_near(gradients(both_losses, t), gradients(expected, exact))
    for _ in range(2):
        loss_of(t, backend).backward()
    assert_near(tuple(x.grad for x in t.values()), tuple(2 * g for g in wanted))  # pyright: ignore[reportArgumentType]


@both
def test_fp16_gradients_survive_a_large_denominator(backend: Any) -> None:
    """A loss over a million tokens, scaled up as a GradScaler does: nothing underflows between forward and backward."""
    mine, exact = inputs(torch.float16, False, False), inputs(torch.float64, False, False)
    ours = gradients(loss_of(mine, backend, denominator=2.0**20) * 2.0**16, mine)
    theirs = gradients(formula(exact, denominator=2.0**20) * 2.0**16, exact)
    assert_near(ours, theirs, 3e-3)


@both
def test_micro_batches_add_up(backend: Any) -> None:
    t = inputs(torch.float32, False, False)
    labels = make_labels()
    count = int((labels != -100).sum())
    for part in (slice(0, 20), slice(20, TOKENS)):
        loss = linear_cross_entropy_loss(
            t["hidden"][part], t["weight"], labels[part], ScoreConfig(chunk=8), count, backend=backend
        )
        loss.backward()
    assert_near((t["hidden"].grad, t["weight"].grad), gradients(formula(t), t))  # pyright: ignore[reportArgumentType]


@both
def test_what_is_not_counted_gets_exactly_nothing(backend: Any) -> None:
    t = inputs(torch.float32, False, False)
    ignored = make_labels() == -100
    d_hidden, _ = gradients(loss_of(t, backend), t)
    assert bool((d_hidden[ignored] == 0).all()) and bool((d_hidden[~ignored] != 0).any(1).all())
    none = torch.full((TOKENS,), -100, device=DEVICE)
    for denominator, expected in ((7, 0.0), (None, float("nan"))):
        loss = linear_cross_entropy_loss(t["hidden"], t["weight"], none, ScoreConfig(), denominator, backend=backend)
        stock = F.cross_entropy(t["hidden"] @ t["weight"].T, none) if denominator is None else loss * 0
        torch.testing.assert_close(loss, torch.tensor(expected, device=DEVICE), equal_nan=True)
        for mine, theirs in zip(gradients(loss, t, retain_graph=True), gradients(stock, t), strict=True):
            assert float(mine.abs().sum()) == float(theirs.abs().sum()) == 0.0


@both
@pytest.mark.parametrize("trained", [{"hidden"}, {"weight"}, {"a", "b"}, {"bias"}, {"hidden", "weight"}])
def test_only_what_trains_gets_a_gradient(trained: set[str], backend: Any) -> None:
    t = {name: x.detach().requires_grad_(name in trained) for name, x in inputs(torch.float32, True, True).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in t.items()}
    loss_of(t, backend).backward()
    wanted = dict(zip(exact, gradients(formula(exact), exact), strict=True))
    assert {name for name, x in t.items() if x.grad is not None} == trained
    for name in trained:
        assert relative_error(t[name].grad, wanted[name]) < 1e-5  # pyright: ignore[reportArgumentType]


@both
def test_weights_of_another_dtype_are_cast_and_get_gradients_of_their_own(backend: Any) -> None:
    """A head that trains in fp32 beside a bf16 model: its gradient is never rounded to bf16."""
    t = {name: x.detach().requires_grad_() for name, x in inputs(torch.float32, True, False).items()}
    t["hidden"] = t["hidden"].detach().bfloat16().requires_grad_()
    ours = gradients(loss_of(t, backend), t)
    assert [g.dtype for g in ours] == [x.dtype for x in t.values()]
    exact = {name: x.detach().bfloat16().double().requires_grad_() for name, x in t.items()}
    assert_near(ours, gradients(formula(exact), exact), 1.5e-2)
    assert not torch.equal(ours[1], ours[1].bfloat16().float())


class Matmuls(TorchDispatchMode):
    """Counts the multiply-adds of all matmuls, in units of one matmul of all tokens with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            inner = args[-1].shape[0] if func.overloadpacket is torch.ops.aten.mm else args[2].shape[0]
            self.count += out.numel() * inner / (TOKENS * WIDTH * WORDS)
        return out


@pytest.mark.parametrize(
    ("trained", "matmuls"), [(("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 3), ((), 1)]
)
def test_no_logit_is_computed_twice(trained: tuple[str, ...], matmuls: int) -> None:
    t = {name: x.detach().requires_grad_(name in trained) for name, x in inputs(torch.float32, False, False).items()}
    labels = make_labels().clamp(min=0)
    with Matmuls() as counted:
        loss = linear_cross_entropy_loss(t["hidden"], t["weight"], labels, ScoreConfig(chunk=8), backend="triton")
        if trained:
            loss.backward()
    assert counted.count == pytest.approx(matmuls)


@pytest.mark.parametrize("per_token", [False, True])
def test_no_gradient_is_computed_without_grad_mode(per_token: bool) -> None:
    t, labels = inputs(torch.float32, False, False), make_labels()
    op = linear_cross_entropy if per_token else linear_cross_entropy_loss
    for frozen in (False, True):
        t["weight"].requires_grad_(not frozen)
        with torch.no_grad(), Matmuls() as counted:
            out: Any = op(t["hidden"], t["weight"], labels, ScoreConfig(chunk=8), backend="triton")
        assert counted.count == pytest.approx(1)
        assert not (out.loss if per_token else out).requires_grad


def test_weight_trains_in_chunks_as_large_as_its_gradient() -> None:
    hidden = torch.empty(1, 2048, dtype=torch.bfloat16, device="meta")
    assert tokens_at_once(ScoreConfig(), hidden, False) == ScoreConfig().chunk == 1024
    assert tokens_at_once(ScoreConfig(), hidden, True) * hidden.element_size() == 4 * hidden.shape[1]


@both
def test_nothing_is_left_unwritten(backend: Any) -> None:
    """With trained weights, chunk after chunk into the same buffer; the vocabulary is no multiple of the row padding."""
    t = inputs(torch.float32, True, True)
    with poisoned_memory():
        for config in (ScoreConfig(chunk=8), ScoreConfig(chunk=8, want=OPTIONAL_SCORES)):
            loss = loss_of(t, backend, config)
            assert bool(torch.stack([g.isfinite().all() for g in (loss, *gradients(loss, t))]).all())
        lora = LoraHead(t["a"], t["b"], 0.5)
        scores = linear_cross_entropy(t["hidden"], t["weight"], make_labels(), config, t["bias"], lora, backend)
        for name in SCORES:
            assert bool(getattr(scores, name).isfinite().all()), name


@pytest.mark.grid(2)
@pytest.mark.parametrize("words", [64, 65, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("columns", [64, 256])
def test_rows_of_many_blocks(words: int, softcap: float | None, columns: int) -> None:
    """The kernel alone against the reference: several blocks a row, the last one cut short, ties at the top."""
    raw = (torch.randn(5, words, device=DEVICE) * 3).round()
    raw[3] = -30000.0
    labels = torch.tensor([0, words - 1, words // 2, 3, int(raw[4].argmax())], device=DEVICE)
    config = ScoreConfig(-0.5 if softcap is None else 0.5, softcap, 0.7, label_smoothing=0.1, want=OPTIONAL_SCORES)
    upstream = Upstream(*torch.randn(3, 5, device=DEVICE))
    found = []
    for score_rows in (reference.score_rows, kernel.score_rows):
        extra = {"launch": kernel.Launch(columns, 2)} if score_rows is kernel.score_rows else {}
        scores = torch.full((6, 5), float("nan"), device=DEVICE)
        found.append((scores, score_rows(raw.clone(), labels, config, scores, upstream, **extra)))
    (scores, d_raw), (mine, d_mine) = found
    # A GPU multiplies and subtracts in one rounding, so what is left of logits in the ten thousands is off by their own ulp.
    for row in range(5):
        atol = 2e-5 + (0.0 if DEVICE == "cpu" or softcap else float(raw[row].abs().max()) * 2**-23)
        torch.testing.assert_close(mine[:, row], scores[:, row], rtol=1e-5, atol=atol)
        torch.testing.assert_close(d_mine[row], d_raw[row], rtol=1e-5, atol=atol)


@both
def test_labels_outside_of_the_vocabulary(backend: Any) -> None:
    t = inputs(torch.float32, False, False)
    beyond = torch.full((TOKENS,), WORDS, device=DEVICE)
    call = lambda: linear_cross_entropy_loss(t["hidden"], t["weight"], beyond, ScoreConfig(), backend=backend)  # noqa: E731
    if backend == "triton":
        assert bool(call().isnan())
    else:
        with pytest.raises(IndexError, match="labels run from"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("denominator", [None, 50, "on the device"])
def test_nothing_waits_for_the_device(denominator: Any) -> None:
    t = inputs(torch.bfloat16, True, True)
    labels = make_labels()
    lora = LoraHead(t["a"], t["b"], 0.5)
    if denominator == "on the device":
        denominator = torch.tensor(50, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy_loss(
            t["hidden"], t["weight"], labels, ScoreConfig(), denominator, t["bias"], lora
        ).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
