"""What transformers' users pass to generate and get back: dictionaries, criteria, processors, streamers, stop strings."""

from typing import Any

import pytest
import torch
from decode_kit import both, engine_note, prompts, served
from device_kit import DEVICE
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hasten.overlays.cache_name import CACHE
from hasten.testing.tiny import tiny_tokenizer


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 9}], ids=str)
@pytest.mark.parametrize("eos", [None, "early"])
def test_dictionary_is_stocks(how: dict[str, Any], eos: Any) -> None:
    stock, ours = served("cohere2")
    batch = prompts()
    if eos is not None:
        eos = sorted({int(row[-1]) for row in stock.generate(**batch, max_new_tokens=2, do_sample=False)})
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "eos_token_id": eos,
        "pad_token_id": 0,
    }
    expected, found = both(stock, ours, **batch, max_new_tokens=9, repetition_penalty=1.3, **asked, **how)
    assert type(found) is type(expected) and torch.equal(found.sequences, expected.sequences)
    new = found.sequences.shape[1] - batch["input_ids"].shape[1]
    assert len(found.scores) == len(found.logits) == new > 1
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=2e-5)
    assert found.attentions is None and found.hidden_states is None
    torch.testing.assert_close(
        ours.compute_transition_scores(found.sequences, found.scores, normalize_logits=True),
        stock.compute_transition_scores(expected.sequences, expected.scores, normalize_logits=True),
        rtol=2e-5, atol=2e-5,
    )  # fmt: skip


def test_only_what_was_asked_for_is_in_the_dictionary() -> None:
    stock, ours = served("llama")
    expected, found = both(stock, ours, **prompts(), max_new_tokens=3, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences) and found.scores is found.logits is None
    expected, found = both(stock, ours, **prompts(), max_new_tokens=3, output_scores=True)
    assert isinstance(found, torch.Tensor) and torch.equal(found, expected)


def test_cache_in_the_dictionary_is_stocks() -> None:
    """Window layers keep only their window, as in transformers' own cache."""
    stock, ours = served("gemma3_text")
    batch = prompts(lengths=(5, 30, 1))
    expected, found = both(stock, ours, **batch, max_new_tokens=7, do_sample=False, return_dict_in_generate=True)
    got, wanted = found[CACHE], expected[CACHE]
    assert type(got) is type(wanted) and got.get_seq_length() == wanted.get_seq_length() == 36
    real = torch.cat((batch["attention_mask"], torch.ones(3, 6, dtype=torch.long, device=DEVICE)), 1).bool()
    for mine, theirs in zip(got.layers, wanted.layers, strict=True):
        assert type(mine) is type(theirs) and mine.keys.shape == theirs.keys.shape
        seen = real[:, -mine.keys.shape[2] :]
        for name in ("keys", "values"):
            pair = (getattr(one, name).transpose(1, 2)[seen] for one in (mine, theirs))
            torch.testing.assert_close(*pair, rtol=2e-5, atol=2e-5)


class Stops(StoppingCriteria):
    """A user's criterion: stops each row at its own length, and counts its calls."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append((input_ids.shape[1], input_ids.is_contiguous()))
        return torch.arange(len(input_ids), device=input_ids.device) + 13 <= input_ids.shape[1]


class Rolls(LogitsProcessor):
    """A user's processor."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append((input_ids.shape[1], input_ids.is_contiguous()))
        return scores.roll(1, dims=-1)


@pytest.mark.parametrize("kind", [Stops, Rolls])
def test_code_of_the_user_is_called_as_often_as_by_stock(kind: Any) -> None:
    stock, ours = served("llama")
    role, made = (
        ("stopping_criteria", StoppingCriteriaList) if kind is Stops else ("logits_processor", LogitsProcessorList)
    )
    calls = [kind(), kind()]
    results = []
    for model, one in zip((stock, ours), calls, strict=True):
        results.append(
            model.generate(**prompts(), max_new_tokens=6, eos_token_id=2, pad_token_id=0, **{role: made([one])})
        )
    assert torch.equal(*results) and engine_note(ours) == "engine: hasten"
    assert calls[0].seen == calls[1].seen and len(calls[0].seen) > 2


class Scores(StoppingCriteria):
    """Reads the scores of all steps so far."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(len(scores))
        return scores[-1].argmax(-1) < 200


def test_criteria_read_scores() -> None:
    stock, ours = served("llama")
    one = Scores()
    asked = {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": StoppingCriteriaList([one])}
    expected, found = both(stock, ours, **prompts(), max_new_tokens=12, pad_token_id=0, **asked)
    half = len(one.seen) // 2
    assert torch.equal(found.sequences, expected.sequences) and one.seen[:half] == one.seen[half:]


def test_generation_ends_when_its_time_is_up() -> None:
    _, ours = served("llama")
    found = ours.generate(**prompts(), max_new_tokens=50, max_time=0.0)
    assert found.shape[1] == 12 and engine_note(ours) == "engine: hasten"
    criteria = StoppingCriteriaList([MaxTimeCriteria(60.0)])
    assert ours.generate(**prompts(), max_new_tokens=5, eos_token_id=None, stopping_criteria=criteria).shape[1] == 16


def test_a_criterion_for_the_length_goes_to_transformers() -> None:
    """It replaces transformers' own, so that the call may be longer than what was checked."""
    stock, ours = served("llama")
    asked = {
        "max_new_tokens": 3,
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(20)]),
        "eos_token_id": None,
    }
    results = [model.generate(**prompts(), **asked) for model in (stock, ours)]
    assert torch.equal(*results) and results[0].shape[1] == 20
    assert "MaxLengthCriteria" in engine_note(ours)


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_stop_strings(where: str) -> None:
    stock, ours = served("llama", vocab_size=262)
    tokenizer = tiny_tokenizer()
    batch = {name: x % 262 for name, x in prompts().items()}
    free = stock.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=None)
    texts: Any = [[tokenizer.decode([token]) for token in row[13:]] for row in free.tolist()]
    strings = [next(text for text in row if text.isascii() and text) for row in texts]
    results = []
    for model in (stock, ours):
        asked: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "tokenizer": tokenizer, "eos_token_id": None}
        if where == "argument":
            asked["stop_strings"] = strings
        elif where == "config":
            settings = {k: asked.pop(k) for k in ("max_new_tokens", "do_sample", "eos_token_id")}
            asked["generation_config"] = GenerationConfig(stop_strings=strings, **settings)
        else:
            model.generation_config.stop_strings = strings
        results.append(model.generate(**batch, pad_token_id=0, **asked))
        if where == "config":
            assert asked["generation_config"].stop_strings == strings
    assert torch.equal(*results) and results[0].shape[1] < free.shape[1]
    assert engine_note(ours) == "engine: hasten"


def test_stop_strings_without_a_tokenizer_get_transformers_error() -> None:
    _, ours = served("llama")
    with pytest.raises(ValueError, match="tokenizer"):
        ours.generate(**prompts(), max_new_tokens=3, stop_strings=["a"])


def test_prefix_allowed_tokens() -> None:
    stock, ours = served("llama")
    seen: list[tuple[int, int]] = []

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        seen.append((row, len(ids)))
        return [7 + row, 100 + len(ids)]

    expected, found = both(stock, ours, **prompts(), max_new_tokens=6, prefix_allowed_tokens_fn=allowed)
    half = len(seen) // 2
    assert torch.equal(found, expected) and seen[:half] == seen[half:]


@pytest.mark.parametrize("name", ["logits_to_keep", "labels", "cu_seq_lens_q", "position_ids", "typo"])
def test_arguments_of_the_forward_go_to_transformers(name: str) -> None:
    """They would have no effect in a captured step."""
    stock, ours = served("llama")
    batch = prompts()
    value = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0) if name == "position_ids" else 1
    results = []
    for model in (stock, ours):
        try:
            results.append(model.generate(**batch, max_new_tokens=3, do_sample=False, **{name: value}))
        except (ValueError, TypeError, RuntimeError) as error:
            results.append(type(error))
    assert results[0] is results[1] if isinstance(results[0], type) else torch.equal(*results)
    assert engine_note(ours) == f"engine: transformers, since {name} was given"


def test_a_call_from_within_a_call_is_transformers_own() -> None:
    stock, ours = served("llama")
    inner = prompts(lengths=(4,), seed=9)

    class Nested(StoppingCriteria):
        def __init__(self, model: Any) -> None:
            self.model, self.found = model, []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.found.append(self.model.generate(**inner, max_new_tokens=4, do_sample=False)[0].tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    criteria = [Nested(stock), Nested(ours)]
    results = [
        one.model.generate(
            **prompts(), max_new_tokens=4, do_sample=False, stopping_criteria=StoppingCriteriaList([one])
        )
        for one in criteria
    ]
    assert torch.equal(*results) and criteria[0].found == criteria[1].found
    assert "a call of this model is running" in engine_note(ours)
    assert torch.equal(*both(stock, ours, **prompts(), max_new_tokens=4, do_sample=False))


def test_an_error_of_the_user_leaves_the_engine_usable() -> None:
    stock, ours = served("llama")

    def stop(*_: Any) -> list[int]:
        raise RuntimeError("from inside")

    with pytest.raises(RuntimeError, match="from inside"):
        ours.generate(**prompts(), max_new_tokens=4, prefix_allowed_tokens_fn=stop)
    assert torch.equal(*both(stock, ours, **prompts(), max_new_tokens=4, do_sample=False))


def test_inference_mode_and_autocast_do_not_stay() -> None:
    """Tensors that a step keeps are made in the first call, whatever mode that runs in."""
    stock, ours = served("llama")
    with torch.inference_mode():
        first = ours.generate(**prompts(), max_new_tokens=4, do_sample=False)
    expected, found = both(stock, ours, **prompts(), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected) and torch.equal(first, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours.generate(**prompts(), max_new_tokens=4, do_sample=False)
    assert torch.equal(ours.generate(**prompts(), max_new_tokens=4, do_sample=False), expected)
