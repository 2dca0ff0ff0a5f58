"""The fused head against full logits in fp64: each score, each gradient, each option, and the memory it must not take."""

from typing import Any

import pytest
import torch
from device_kit import DEVICE
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.ops import LoraHead, ScoreConfig, linear_cross_entropy, score_logits
from hasten.ops.linear_cross_entropy import OPTIONAL_SCORES
from hasten.testing import relative_error

TOKENS, WIDTH, WORDS = 37, 16, 101
both = pytest.mark.parametrize("backend", ["reference", "triton"])
CONFIGS = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "softcapped": {"softcap": 2.0},
    "all": {"logit_scale": 0.5, "softcap": 3.0, "temperature": 0.7, "label_smoothing": 0.1},
    "temperature": {"temperature": 2.5},
    "smoothed": {"label_smoothing": 0.2},
    "own ignore index": {"ignore_index": 5},
}


def full_scores(raw: torch.Tensor, labels: torch.Tensor, config: ScoreConfig) -> dict[str, torch.Tensor]:
    """The contract written out, on logits that are all there."""
    z = raw * config.logit_scale
    z = z if config.softcap is None else config.softcap * torch.tanh(z / config.softcap)
    z = z / config.temperature
    kept = labels != config.ignore_index
    log_p = z.log_softmax(-1)
    safe = labels.clamp(min=0)
    scores = {
        "loss": F.cross_entropy(
            z, labels, ignore_index=config.ignore_index, label_smoothing=config.label_smoothing, reduction="none"
        ),
        "log_prob": log_p[torch.arange(len(labels)), safe],
        "entropy": torch.distributions.Categorical(logits=z).entropy(),
        "is_top1": (z.argmax(-1) == labels).to(z.dtype),
        "log_sum_sq_probs": log_p.exp().pow(2).sum(-1).log(),
        "mean_logits": z.mean(-1),
    }
    return {name: score.where(kept, 0.0) for name, score in scores.items()}


def inputs(dtype: torch.dtype, lora: bool, bias: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = {"hidden": (TOKENS, WIDTH), "weight": (WORDS, WIDTH)}
    shapes |= {"a": (3, WIDTH), "b": (WORDS, 3)} if lora else {}
    shapes |= {"bias": (WORDS,)} if bias else {}
    return {
        name: (torch.randn(shape, generator=generator) * 0.4).to(DEVICE, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def raw_logits(t: dict[str, torch.Tensor]) -> torch.Tensor:
    raw = F.linear(t["hidden"], t["weight"], t.get("bias"))
    return raw + 0.5 * (t["hidden"] @ t["a"].T) @ t["b"].T if "a" in t else raw


def fused(t: dict[str, torch.Tensor], labels: torch.Tensor, config: ScoreConfig, backend: Any = None) -> Any:
    lora = LoraHead(t["a"], t["b"], 0.5) if "a" in t else None
    return linear_cross_entropy(t["hidden"], t["weight"], labels, config, t.get("bias"), lora, backend)


def make_labels() -> torch.Tensor:
    labels = torch.randint(0, WORDS, (TOKENS,), generator=torch.Generator().manual_seed(12))
    labels[::4], labels[3] = -100, 5
    return labels.to(DEVICE)


@pytest.mark.grid(2)
@both
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("lora", "bias"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("chunk", [8, 1024])
def test_scores_and_gradients(name: str, lora: bool, bias: bool, chunk: int, backend: Any) -> None:
    config = ScoreConfig(**CONFIGS[name], want=OPTIONAL_SCORES, chunk=chunk)
    labels = make_labels()
    if config.ignore_index != -100:
        labels = labels.where(labels != -100, config.ignore_index)
    mine, exact = inputs(torch.float32, lora, bias), inputs(torch.float64, lora, bias)
    scores, reference = fused(mine, labels, config, backend), full_scores(raw_logits(exact), labels, config)
    for score, expected in reference.items():
        assert relative_error(getattr(scores, score), expected) < 3e-6, score
    weights = torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(13)).to(DEVICE)
    pick = ("loss", "log_prob", "entropy")
    total = sum((w * getattr(scores, s)).sum() for w, s in zip(weights, pick, strict=True))
    wanted = sum((w.double() * reference[s]).sum() for w, s in zip(weights, pick, strict=True))
    ours = torch.autograd.grad(total, list(mine.values()))  # pyright: ignore[reportArgumentType]
    theirs = torch.autograd.grad(wanted, list(exact.values()))  # pyright: ignore[reportArgumentType]
    for tensor, grad, expected in zip(mine, ours, theirs, strict=True):
        assert relative_error(grad, expected) < 1e-5, tensor


def test_scores_from_logits_are_the_same() -> None:
    config = ScoreConfig(logit_scale=0.5, softcap=3.0, want=OPTIONAL_SCORES)
    t, labels = inputs(torch.float64, False, False), make_labels()
    ours, reference = score_logits(raw_logits(t), labels, config), full_scores(raw_logits(t), labels, config)
    for name, expected in reference.items():
        torch.testing.assert_close(getattr(ours, name), expected)


@both
@pytest.mark.parametrize("trained", ["hidden", "weight", "a", "b", "bias"])
def test_only_what_trains_gets_a_gradient(trained: str, backend: Any) -> None:
    t = {name: x.detach().requires_grad_(name == trained) for name, x in inputs(torch.float32, True, True).items()}
    fused(t, make_labels(), ScoreConfig(), backend).loss.sum().backward()
    assert {name for name, x in t.items() if x.grad is not None} == {trained}
    assert float(t[trained].grad.norm()) > 0  # pyright: ignore[reportOptionalMemberAccess]


def test_gradcheck() -> None:
    t = inputs(torch.float64, True, True)
    config = ScoreConfig(
        logit_scale=0.5, softcap=3.0, temperature=0.8, label_smoothing=0.1, want=frozenset({"entropy"}), chunk=8
    )

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = fused(dict(zip(t, values, strict=True)), make_labels(), config, "reference")
        return scores.loss, scores.log_prob, scores.entropy

    assert torch.autograd.gradcheck(function, tuple(t.values()))


@both
def test_bf16_weight_gradient_is_summed_in_fp32(backend: Any) -> None:
    """Many small chunks: sums kept in bf16 would lose what fp32 keeps."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(512, WIDTH, generator=generator).to(DEVICE, torch.bfloat16)
    weight = torch.randn(WORDS, WIDTH, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    labels = torch.randint(0, WORDS, (512,), generator=generator).to(DEVICE)
    linear_cross_entropy(hidden, weight, labels, ScoreConfig(chunk=16), backend=backend).loss.sum().backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum").backward()
    assert weight.grad is not None and exact.grad is not None
    assert relative_error(weight.grad, exact.grad) < 6e-3


@both
def test_all_ignored_gives_zero_and_zero_gradients(backend: Any) -> None:
    t = inputs(torch.float32, False, False)
    scores = fused(t, torch.full((TOKENS,), -100, device=DEVICE), ScoreConfig(want=OPTIONAL_SCORES), backend)
    assert float(scores.loss.detach().abs().sum()) == 0.0
    scores.loss.sum().backward()
    assert t["hidden"].grad is not None and float(t["hidden"].grad.abs().sum()) == 0.0


@both
def test_what_is_refused(backend: Any) -> None:
    t = inputs(torch.float32, False, False)
    with pytest.raises(ValueError, match="no such token score"):
        fused(t, make_labels(), ScoreConfig(want=frozenset({"perplexity"})), backend)
    beyond = torch.full((TOKENS,), WORDS, device=DEVICE)
    if backend == "triton":
        assert bool(fused(t, beyond, ScoreConfig(), backend).loss.isnan().all())
    else:
        with pytest.raises(IndexError, match="labels run from"):
            fused(t, beyond, ScoreConfig(), backend)
    loss = fused(t, make_labels(), ScoreConfig(), backend).loss.square().sum()
    (first,) = torch.autograd.grad(loss, t["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class _LargestLogits(TorchDispatchMode):
    """Notes the most rows that any tensor of vocabulary width has had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2 and tensor.shape[-1] == WORDS:
                self.rows = max(self.rows, tensor.numel() // WORDS)
        return out


@both
def test_no_tensor_of_all_tokens_by_vocabulary_ever_lives(backend: Any) -> None:
    t = inputs(torch.float32, True, False)
    with _LargestLogits() as watched:
        fused(t, make_labels(), ScoreConfig(chunk=16, want=OPTIONAL_SCORES), backend).loss.sum().backward()
    assert watched.rows == 16  # b.T is (3, WORDS), a chunk's logits (16, WORDS)
