"""Nothing longer than max_seq_length runs, and nothing is cut off silently."""

from typing import Any

import pytest
import torch
from support import padded, prompts, twins
from transformers import GenerationConfig

from hasten.errors import InputError
from hasten.overlays.cache_name import CACHE

LIMIT = 24
ROW = prompts(2)[1][None]  # 17 tokens


def counting(model: Any) -> list[int]:
    """Grows by one with every forward of the model."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("prompt", "asked", "message"),
    [
        (torch.full((1, LIMIT + 1), 7), {"max_new_tokens": 1}, "a prompt of 25 tokens"),
        (ROW, {"max_new_tokens": 8}, "at most 7 new tokens"),
        (ROW, {"max_length": 25}, "at most 7 new tokens"),
        (ROW, {"generation_config": GenerationConfig(max_new_tokens=8)}, "at most 7 new tokens"),
        (torch.full((1, LIMIT), 7), {}, "no token can be generated"),
    ],
)
def test_too_long_is_refused_before_anything_runs(prompt: torch.Tensor, asked: dict[str, Any], message: str) -> None:
    ours, _ = twins("llama", max_seq_length=LIMIT)
    calls = counting(ours)
    with pytest.raises(InputError, match=message):
        ours.generate(prompt, **asked)
    assert not calls


@pytest.mark.parametrize("asked", [{"max_new_tokens": 7}, {"max_length": LIMIT}])
def test_up_to_the_limit_runs(asked: dict[str, Any]) -> None:
    ours, stock = twins("llama", max_seq_length=LIMIT)
    output = ours.generate(ROW, do_sample=False, **asked)
    assert output.shape[1] == LIMIT
    assert torch.equal(output, stock.generate(ROW, do_sample=False, **asked))


def test_no_limit_takes_any_length() -> None:
    ours, _ = twins("llama")
    assert ours.generate(ROW, max_new_tokens=LIMIT, eos_token_id=None).shape[1] == ROW.shape[1] + LIMIT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    ours, _ = twins("llama", max_seq_length=LIMIT)
    ids, mask = padded([ROW[0], torch.full((40,), 7)], side)
    ids, mask = ids[:1], mask[:1]
    assert ids.shape[1] == 40
    assert ours.generate(ids, attention_mask=mask, max_new_tokens=7, eos_token_id=None).shape[1] == 47
    with pytest.raises(InputError, match="17 tokens and 8 new ones"):
        ours.generate(ids, attention_mask=mask, max_new_tokens=8)


@pytest.mark.parametrize("own", [{}, {"max_length": 200}, {"max_new_tokens": 200}])
@pytest.mark.parametrize("with_config", [False, True])
def test_a_length_that_the_call_does_not_ask_for_is_lowered(own: dict[str, int], with_config: bool) -> None:
    """transformers' default of 20 new tokens, or a checkpoint's generation config, is bounded by what the model takes."""
    ours, _ = twins("llama", max_seq_length=LIMIT)
    for name, value in own.items():
        setattr(ours.generation_config, name, value)
    before = ours.generation_config.to_dict()
    config = GenerationConfig(do_sample=False) if with_config else None
    output = ours.generate(ROW, config, eos_token_id=None)
    assert output.shape[1] == LIMIT
    assert ours.generation_config.to_dict() == before
    assert config is None or (config.max_length, config.max_new_tokens) == (None, None)


def test_cached_tokens_count() -> None:
    ours, _ = twins("llama", max_seq_length=LIMIT)
    first = ours.generate(ROW, max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None)
    with pytest.raises(InputError, match="21 tokens and 4 new ones"):
        ours.generate(first.sequences, **{CACHE: first[CACHE]}, max_new_tokens=4)
    output = ours.generate(first.sequences, **{CACHE: first[CACHE]}, max_new_tokens=3, eos_token_id=None)
    assert output.shape[1] == LIMIT
