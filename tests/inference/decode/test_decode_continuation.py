"""A cache given back to generate is continued: its tokens are not run again, and the results are those of transformers."""

import copy
from typing import Any

import pytest
import torch
from decode_kit import both, engine_note, fed_tokens, prompts, served, uninitialised_is_nan
from device_kit import DEVICE
from transformers import DynamicCache, StaticCache

from hasten.families import FAMILIES
from hasten.overlays.cache_name import CACHE

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def longer(ids: torch.Tensor, tokens: int, seed: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat((ids, torch.randint(6, 280, (len(ids), tokens), generator=generator).to(ids.device)), dim=1)


def same_cache(found: Any, wanted: Any, real: torch.Tensor | None = None) -> None:
    """real: (B, T), which positions are not padding."""
    assert type(found) is type(wanted) and found.get_seq_length() == wanted.get_seq_length()
    assert len(found.layers) == len(wanted.layers)
    for mine, theirs in zip(found.layers, wanted.layers, strict=True):
        assert type(mine) is type(theirs) and mine.keys.shape == theirs.keys.shape
        for name in ("keys", "values"):
            one, other = (getattr(layer, name).transpose(1, 2) for layer in (mine, theirs))
            seen = (
                torch.ones(one.shape[:2], dtype=torch.bool, device=one.device)
                if real is None
                else real[:, -one.shape[1] :]
            )
            torch.testing.assert_close(one[seen], other[seen], rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turn", [3, 40])
def test_second_turn_runs_only_the_new_tokens(family: str, turn: int) -> None:
    """Windows of 8 and a second turn of more than `MAX_NEW_TOKENS`."""
    stock, ours = served(family)
    results: list[list[Any]] = [[], []]
    for model, found in zip((stock, ours), results, strict=True):
        ids = prompts(lengths=(14,))["input_ids"]
        first = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True, **GREEDY)
        assert first[CACHE].get_seq_length() == 19
        ids = longer(first.sequences, turn)
        if model is ours:
            with fed_tokens(ours) as counts:
                second = model.generate(
                    ids, **{CACHE: first[CACHE]}, max_new_tokens=5, return_dict_in_generate=True, **GREEDY
                )
            assert counts == [turn + 1, 1, 1, 1, 1]
            assert engine_note(ours) == "engine: hasten"
        else:
            second = model.generate(
                ids, **{CACHE: first[CACHE]}, max_new_tokens=5, return_dict_in_generate=True, **GREEDY
            )
        found += [first.sequences, second.sequences, second[CACHE]]
        assert second[CACHE] is first[CACHE]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    same_cache(results[1][2], results[0][2])


@pytest.mark.parametrize("made", ["empty", "empty without config"])
def test_chat_over_one_cache(made: str) -> None:
    """The caller's own cache, given to every turn and filled in place."""
    stock, ours = served("gemma3_text")
    caches = [DynamicCache(config=m.config) if made == "empty" else DynamicCache() for m in (stock, ours)]
    ids = [prompts(lengths=(9,))["input_ids"]] * 2
    for turn in range(3):
        for index, model in enumerate((stock, ours)):
            asked = longer(ids[index], 4 + 13 * turn, seed=turn)
            ids[index] = model.generate(asked, **{CACHE: caches[index]}, max_new_tokens=6, **GREEDY)
        assert engine_note(ours) == "engine: hasten"
        assert torch.equal(*ids)
        same_cache(caches[1], caches[0])
    assert caches[0].get_seq_length() == ids[0].shape[1] - 1


def test_a_prefix_run_once_and_copied_for_each_question() -> None:
    """The forward fills the cache, a copy is continued, the original stays."""
    stock, ours = served("qwen3")
    ids = prompts(lengths=(30,))["input_ids"]
    for seed in range(3):
        found = []
        for model in (stock, ours):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids, **{CACHE: cache})
            before = copy.deepcopy(cache)
            question = longer(ids, 5, seed)
            found.append(model.generate(question, **{CACHE: copy.deepcopy(cache)}, max_new_tokens=6, **GREEDY))
            same_cache(cache, before)
        assert torch.equal(*found) and engine_note(ours) == "engine: hasten"


def test_ragged_batch_with_only_the_new_tokens_and_the_whole_mask() -> None:
    stock, ours = served("mistral")
    batch = prompts()
    results = []
    for model in (stock, ours):
        first = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
        new = longer(first.sequences[:, -1:], 6)
        mask = torch.cat((batch["attention_mask"], torch.ones(3, 3 + 7, dtype=torch.long, device=DEVICE)), dim=1)
        asked = {"attention_mask": mask, CACHE: first[CACHE], "max_new_tokens": 5, **GREEDY}
        with fed_tokens(ours) as counts:
            results.append(model.generate(new, **asked, return_dict_in_generate=True))
    assert counts == [7, 1, 1, 1, 1] and engine_note(ours) == "engine: hasten"
    wanted, found = results
    assert torch.equal(found.sequences, wanted.sequences)
    real = torch.cat((mask, torch.ones(3, 4, dtype=torch.long, device=DEVICE)), dim=1).bool()
    same_cache(found[CACHE], wanted[CACHE], real)


def test_what_a_window_has_left_out_is_not_read() -> None:
    """Slots before it are nowhere in transformers' cache; hidden ones are still multiplied by 0."""
    stock, ours = served("mistral")
    results = []
    with uninitialised_is_nan():
        for model in (stock, ours):
            first = model.generate(**prompts(lengths=(40,)), max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
            assert first[CACHE].layers[0].keys.shape[2] == 7
            ids = longer(first.sequences, 3)
            results.append(model.generate(ids, **{CACHE: first[CACHE]}, max_new_tokens=5, **GREEDY))
    assert torch.equal(*results) and engine_note(ours) == "engine: hasten"


@pytest.mark.parametrize("whole", [True, False])
def test_past_a_block_and_the_context(whole: bool) -> None:
    """A prefix that nearly fills the first block of a model of 128 positions."""
    stock, ours = served("llama", num_hidden_layers=2)
    results = []
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        first = model.generate(**prompts(lengths=(246,)), max_new_tokens=5, **{CACHE: cache}, **GREEDY)
        ids = longer(first, 4)
        mask = torch.ones_like(ids)
        asked = ids if whole else ids[:, 250:]
        results.append(model.generate(asked, attention_mask=mask, **{CACHE: cache}, max_new_tokens=9, **GREEDY)[:, -9:])
        assert cache.get_seq_length() == 263
    assert torch.equal(*results) and engine_note(ours) == "engine: hasten"


def test_a_cropped_cache() -> None:
    stock, ours = served("llama")
    results = []
    for model in (stock, ours):
        first = model.generate(**prompts(lengths=(9,)), max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
        first[CACHE].crop(-5)
        ids = longer(first.sequences[:, :12], 3)
        results.append(model.generate(ids, **{CACHE: first[CACHE]}, max_new_tokens=5, **GREEDY))
    assert torch.equal(*results) and engine_note(ours) == "engine: hasten"


def test_stock_continues_what_the_engine_left() -> None:
    """Beams, which the engine does not serve, and a plain forward."""
    stock, ours = served("cohere2")
    results = []
    for model in (stock, ours):
        first = model.generate(**prompts(lengths=(12,)), max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
        ids = longer(first.sequences, 3)
        with torch.no_grad():
            results.append(model(ids[:, 16:], **{CACHE: copy.deepcopy(first[CACHE])}).logits)
        results.append(
            model.generate(
                ids,
                **{CACHE: first[CACHE]},
                use_cache=True,
                prefill_chunk_size=4,
                max_new_tokens=4,
                **GREEDY,
            )
        )
    torch.testing.assert_close(results[2], results[0], rtol=3e-5, atol=3e-5)
    assert torch.equal(results[1], results[3]) and "prefill_chunk_size" in engine_note(ours)


def static(model: Any, ids: torch.Tensor) -> Any:
    return StaticCache(config=model.config, max_cache_len=64)


def of_another_batch(model: Any, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4].expand(2, -1), **{CACHE: cache})
    return cache


def of_the_whole_prompt(model: Any, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    return cache


def recording(model: Any, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :4], **{CACHE: cache})
    return cache


@pytest.mark.parametrize("make", [static, of_another_batch, of_the_whole_prompt, recording])
def test_other_caches_go_to_transformers(make: Any) -> None:
    stock, ours = served("mistral")
    ids = prompts(lengths=(9,))["input_ids"]
    results = []
    for model in (stock, ours):
        try:
            results.append(model.generate(ids, **{CACHE: make(model, ids)}, max_new_tokens=4, **GREEDY))
        except (RuntimeError, ValueError, IndexError) as error:
            results.append(type(error))
    assert results[0] is results[1] if isinstance(results[0], type) else torch.equal(*results)
    assert engine_note(ours).startswith(f"engine: transformers, since {CACHE} ")


def test_padding_between_turns_goes_to_transformers() -> None:
    stock, ours = served("llama")
    batch = prompts()
    results = []
    for model in (stock, ours):
        first = model.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
        ids = longer(first.sequences, 4)
        mask = torch.ones_like(ids)
        mask[:, :11] = batch["attention_mask"]
        mask[1, 12:16] = 0
        results.append(model.generate(ids, attention_mask=mask, **{CACHE: first[CACHE]}, max_new_tokens=4, **GREEDY))
    assert torch.equal(*results) and "padding between tokens" in engine_note(ours)


def test_several_sequences_per_prompt_have_a_cache_of_their_own() -> None:
    stock, ours = served("llama")
    asked = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 5, "return_dict_in_generate": True}
    wanted, found = both(stock, ours, **prompts(), **asked, eos_token_id=None)
    assert torch.equal(found.sequences, wanted.sequences) and len(found.sequences) == 9
    assert len(found[CACHE].layers[0].keys) == 9
