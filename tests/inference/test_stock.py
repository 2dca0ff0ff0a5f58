"""Every way of decoding is transformers' own: same weights, same seed, same result."""

from typing import Any

import pytest
import torch
from support import padded, prompts, twins
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from hasten.overlays.cache_name import CACHE
from hasten.testing.tiny import FAMILY_CONFIGS, tiny_tokenizer

IDS, MASK = padded(prompts(4), "left")
ROW = prompts(2)[1][None]


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class AfterFive(StoppingCriteria):
    """Stops every row once it is five tokens longer than the prompt."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = input_ids.shape[1] >= IDS.shape[1] + 5
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


def both(ours: Any, stock: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What the two models generate from the same state of the random generator."""
    results = []
    for model in (ours, stock):
        torch.manual_seed(1)
        results.append(model.generate(*args, **kwargs))
    return results[0], results[1]


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_greedy_and_sampling_equal_stock(model_type: str) -> None:
    ours, stock = twins(model_type)
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 3.0, "top_k": 50, "top_p": 0.9}):
        got, wanted = both(ours, stock, input_ids=IDS, attention_mask=MASK, max_new_tokens=16, **how)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "temperature": 3.0},
        {"num_return_sequences": 3, "do_sample": True, "temperature": 3.0},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "do_sample": False},
        {"max_length": IDS.shape[1] + 9},
        {"max_new_tokens": 9, "min_new_tokens": 9},
        {"stopping_criteria": StoppingCriteriaList([AfterFive(), MaxTimeCriteria(60.0)])},
        {"cache_implementation": "static", "do_sample": False},
        {"use_cache": False, "do_sample": False},
        {"prefill_chunk_size": 4, "do_sample": False},
    ],
    ids=lambda how: ",".join(how),
)
def test_the_other_ways_equal_stock(how: dict[str, Any]) -> None:
    ours, stock = twins("gemma2")
    lengths = {"max_length", "max_new_tokens"} & set(how)
    got, wanted = both(ours, stock, IDS, attention_mask=MASK, **how, **({} if lengths else {"max_new_tokens": 12}))
    assert torch.equal(got, wanted)


def test_beams_from_right_padded_rows() -> None:
    ours, stock = twins("llama")
    ids, mask = padded(prompts(4), "right")
    how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    got = ours.generate(ids, attention_mask=mask, **how)
    assert torch.equal(got, stock.generate(IDS, attention_mask=MASK, **how))


@pytest.mark.parametrize("positional", [True, False])
def test_generation_config_by_position_or_name(positional: bool) -> None:
    ours, stock = twins("llama")
    config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=3.0)
    before = config.to_dict()
    args, kwargs = ((IDS, config), {}) if positional else ((IDS,), {"generation_config": config})
    got, wanted = both(ours, stock, *args, attention_mask=MASK, **kwargs)
    assert torch.equal(got, wanted) and got.shape[1] == IDS.shape[1] + 7
    assert config.to_dict() == before


def test_streamer_is_given_what_is_returned() -> None:
    ours, stock = twins("llama")
    ids, mask = padded([ROW[0], torch.full((20,), 7)], "right")
    got, wanted = Recorder(), Recorder()
    output = ours.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=6, do_sample=False, streamer=got)
    stock.generate(ROW, max_new_tokens=6, do_sample=False, streamer=wanted)
    assert got.given[1:] == wanted.given[1:] and len(wanted.given) > 1 and got.ended
    assert [token for put in got.given for token in put] == output[0].tolist()


def test_text_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    ours, _ = twins("llama")
    tokenizer = tiny_tokenizer()
    output = ours.generate(ROW, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(output[0, ROW.shape[1] :])


def test_dictionary_output_has_scores_and_cache() -> None:
    ours, stock = twins("cohere2")
    how = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    got, wanted = both(ours, stock, IDS, attention_mask=MASK, eos_token_id=None, **how)
    assert torch.equal(got.sequences, wanted.sequences)
    for ours_scores, stock_scores in zip(got.scores, wanted.scores, strict=True):
        torch.testing.assert_close(ours_scores, stock_scores, rtol=2e-5, atol=2e-5)
    assert got[CACHE].get_seq_length() == IDS.shape[1] + 4


def test_assistants_equal_plain_greedy() -> None:
    """Speculative decoding: with another model, with this one's own limit, and by looking up the prompt."""
    ours, stock = twins("llama", max_seq_length=64)
    assistant, _ = twins("llama", max_seq_length=64, num_hidden_layers=1)
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = stock.generate(ROW, **how)
    assert torch.equal(ours.generate(ROW, assistant_model=assistant, **how), wanted)
    assert torch.equal(ours.generate(ROW, prompt_lookup_num_tokens=3, **how), wanted)


def test_no_prompt_starts_from_bos() -> None:
    ours, stock = twins("llama")
    got, wanted = both(ours, stock, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, wanted)


def test_mistakes_of_the_caller_get_transformers_own_error() -> None:
    ours, _ = twins("llama")
    with pytest.raises(ValueError, match="temprature"):
        ours.generate(ROW, temprature=1.0)
    with pytest.raises(TypeError):
        ours.generate(ROW, inputs=ROW)
