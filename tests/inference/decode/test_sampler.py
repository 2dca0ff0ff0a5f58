"""Tokens drawn for a batch: transformers' distributions, each sequence by its own seed."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hasten.inference.decode.sampling import Sampler, Sampling

CPU = torch.device("cpu")
DRAWS = 6000


def logits(rows: int, vocabulary: int = 12) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2


def chosen(samplings: dict[int, Sampling], scores: torch.Tensor, seen: torch.Tensor | None = None) -> list[int]:
    rows = {row: (sampling, sampling.generator(CPU)) for row, sampling in samplings.items()}
    token = scores.argmax(-1, keepdim=True)
    Sampler(len(scores), rows, CPU).choose(scores, token, seen)
    return token[:, 0].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=4),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=2.0, top_k=6, top_p=0.8),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0, top_k=50),
    ],
    ids=str,
)
def test_the_distribution_is_transformers(sampling: Sampling) -> None:
    one = logits(1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), one.clone()).softmax(-1)[0]
    seeded = {row: Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed=row) for row in range(DRAWS)}
    counts = torch.bincount(torch.tensor(chosen(seeded, one.expand(DRAWS, -1))), minlength=12)
    assert torch.equal(counts > 0, expected > 1e-9) or counts[expected == 0].sum() == 0
    deviation = (counts / DRAWS - expected).abs()
    assert bool((deviation <= 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-9).all())


def test_a_draw_does_not_depend_on_the_others() -> None:
    scores = logits(4)
    mixed = {0: Sampling(1.0, seed=5), 2: Sampling(0.9, top_k=3, seed=6), 3: Sampling(1.5, top_p=0.9, seed=7)}
    together = chosen(mixed, scores)
    assert together[1] == int(scores[1].argmax())  # not in the sampler: greedy
    for row, sampling in mixed.items():
        assert chosen({0: sampling}, scores[row : row + 1]) == [together[row]]


def test_a_seed_repeats_and_none_does_not() -> None:
    scores = torch.zeros(1, 1000)
    assert chosen({0: Sampling(1.0, seed=3)}, scores) == chosen({0: Sampling(1.0, seed=3)}, scores)
    assert len({chosen({0: Sampling(1.0)}, scores)[0] for _ in range(8)}) > 1


def test_a_temperature_that_logits_cannot_be_divided_by_is_greedy() -> None:
    scores = logits(2)
    for temperature in (1e-45, 1e-40, 1e-6, 1e-5):
        sampled = {row: Sampling(temperature, top_k=3 * row, seed=1) for row in range(2)}
        assert chosen(sampled, scores) == scores.argmax(-1).tolist(), temperature


def test_the_repetition_penalty_is_transformers() -> None:
    scores, ids = logits(3), torch.tensor([[1, 4, 4], [2, 0, 7], [3, 3, 3]])
    before = scores.clone()
    seen = torch.zeros(3, 12, dtype=torch.bool).scatter_(1, ids, True)
    samplings = {0: Sampling(repetition_penalty=3.0), 2: Sampling(repetition_penalty=0.2)}
    expected = scores.argmax(-1)
    for row, sampling in samplings.items():
        processor = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        expected[row] = processor(ids[row : row + 1], scores[row : row + 1].clone()).argmax(-1)[0]
    assert expected.tolist() != scores.argmax(-1).tolist()
    assert chosen(samplings, scores, seen) == expected.tolist()
    assert torch.equal(scores, before)
