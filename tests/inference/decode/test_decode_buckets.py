"""Batches of any size share a few steps, of whose memory a call leaves nothing."""

import random
from typing import Any

import pytest
import torch
from decode_kit import both, fed_tokens, prompts, served, uninitialised_is_nan

from hasten.inference.decode.steps import MOST, Steps, bucket
from hasten.state import state_of


def test_buckets_waste_less_than_half() -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 9, 16, 17, 25, 33, 49, 65, 97)] == [
        1, 2, 4, 8, 16, 16, 24, 32, 48, 64, 96, 128,
    ]  # fmt: skip
    assert all(n <= bucket(n) < 2 * n for n in range(1, 2000))
    assert all(bucket(n) < 1.5 * n for n in range(17, 2000))


def cached_blocks(model: Any) -> int:
    """Blocks that the engine's caches hold."""
    kept = state_of(model).engine._steps._kept.values()  # pyright: ignore
    return sum(len(cache.view(layer).blocks) for cache, _ in kept for layer in range(cache.shape.layers))


def test_100_calls_of_random_sizes_capture_one_step_per_bucket() -> None:
    stock, ours = served("llama", num_hidden_layers=1)
    engine: Any = state_of(ours).engine
    draw = random.Random(0)
    seen = set()
    for call in range(100):
        lengths = tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 12)))
        seen.add(bucket(len(lengths)))
        asked = {**prompts(lengths=lengths, seed=call), "max_new_tokens": draw.randint(1, 6), "do_sample": False}
        if call % 10:
            ours.generate(**asked)
        else:
            expected, found = both(stock, ours, **asked)
            assert torch.equal(found, expected), lengths
        assert cached_blocks(ours) == 0
    assert engine.captured == len(seen) == 5


@pytest.mark.parametrize("sequences", [3, 5, 9])
def test_rows_beyond_the_batch_change_nothing(sequences: int) -> None:
    """Also where a larger batch used the same step before."""
    stock, ours = served("gemma2", num_hidden_layers=2)
    full = prompts(lengths=(9,) * bucket(sequences), seed=1)
    both(stock, ours, **full, max_new_tokens=4)
    lengths = (5, 300, 1, 7, 11, 2, 4, 3, 8)[:sequences]
    with uninitialised_is_nan():
        for how in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0}):
            expected, found = both(stock, ours, **prompts(lengths=lengths), max_new_tokens=5, eos_token_id=None, **how)
            assert torch.equal(found, expected)
    ((cache, _),) = state_of(ours).engine._steps._kept.values()  # pyright: ignore
    assert cache.slots_B.tolist() == [304] * sequences + [4] * (bucket(sequences) - sequences)


def test_the_step_that_was_not_used_for_longest_goes() -> None:
    _, ours = served("llama", num_hidden_layers=1)
    steps, sizes = Steps(), [1]
    while len(sizes) < MOST + 3:
        sizes.append(bucket(sizes[-1] + 1))
    first = steps.take(ours, 1, 8, None)
    for size in sizes[1:]:
        steps.take(ours, size, 8, None)
        assert steps.take(ours, 1, 8, None) == first
    assert len(steps) == MOST
    steps.clear()
    assert len(steps) == 0


def test_a_longer_call_than_the_context_gets_a_larger_step() -> None:
    stock, ours = served("llama", num_hidden_layers=1, max_position_embeddings=300)
    for width in (20, 500, 20):
        expected, found = both(stock, ours, **prompts(lengths=(width,)), max_new_tokens=4, do_sample=False)
        assert torch.equal(found, expected)
    assert state_of(ours).engine.captured == 1  # pyright: ignore


def test_padding_that_every_sequence_has_is_not_run() -> None:
    """A batch padded to a fixed width must not need more slots than `max_seq_length`."""
    stock, ours = served("qwen3", max_seq_length=32)
    batch = {name: torch.nn.functional.pad(x, (40, 0)) for name, x in prompts().items()}
    with fed_tokens(ours) as counts:
        expected, found = both(stock, ours, **batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected) and counts == [11, 1, 1, 1, 1, 1]
