"""The decode engine gives transformers' greedy tokens in fp32, for every family, alone and in ragged batches."""

from typing import Any

import pytest
import torch
from decode_kit import LENGTHS, engine_note, prompts, served
from peft import LoraConfig, get_peft_model

from hasten.families import FAMILIES
from hasten.inference.decode import DecodeEngine
from hasten.methods import CausalLMMethods
from hasten.patching import apply
from hasten.state import state_of
from hasten.testing.quantize import quantize_linears
from hasten.testing.tiny import tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_stocks(family: str) -> None:
    stock, ours = served(family)
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    batch = prompts("left")
    expected = stock.generate(**batch, **asked)
    for _ in range(2):  # the second call reuses the step
        assert torch.equal(ours.generate(**batch, **asked), expected)
    assert engine_note(ours) == "engine: hasten"
    alone = batch["input_ids"][1:2, -LENGTHS[1] :]
    assert torch.equal(ours.generate(alone, **asked), stock.generate(alone, **asked))
    right = ours.generate(**prompts("right"), **asked)
    assert torch.equal(right[:, -12:], expected[:, -12:])


def test_a_stop_ends_each_sequence_where_stock_ends_it() -> None:
    stock, ours = served("llama")
    batch = prompts("left")
    free = stock.generate(**batch, max_new_tokens=30, do_sample=False)
    for eos in sorted(set(free[:, LENGTHS[1] :].flatten().tolist()) - {0})[:6]:
        asked = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
        assert torch.equal(ours.generate(**batch, **asked), stock.generate(**batch, **asked)), eos


def test_processors_and_streamers_are_transformers_own() -> None:
    stock, ours = served("gemma2")
    ids = prompts("left")["input_ids"][1:2]

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.seen.append([])

    asked: dict[str, Any] = {
        "max_new_tokens": 9,
        "do_sample": False,
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
    }
    heard: list[Streamer] = [Streamer(), Streamer()]
    results = [m.generate(ids, **asked, streamer=s) for m, s in zip((stock, ours), heard, strict=True)]
    assert torch.equal(*results) and heard[0].seen == heard[1].seen
    assert engine_note(ours) == "engine: hasten"


def test_sampling_draws_from_the_same_distribution_with_the_same_seed() -> None:
    stock, ours = served("qwen3")
    ids = prompts("left")["input_ids"][1:2]
    results = []
    for model in (stock, ours):
        torch.manual_seed(5)
        results.append(model.generate(ids, max_new_tokens=12, do_sample=True, temperature=0.8, top_k=20, top_p=0.9))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 2},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_what_is_not_served_goes_to_transformers(asked: dict[str, Any]) -> None:
    stock, ours = served("llama")
    ids = prompts("left")["input_ids"][1:2]
    results = [model.generate(ids, max_new_tokens=5, do_sample=False, **asked) for model in (stock, ours)]
    found = [getattr(result, "sequences", result) for result in results]
    assert torch.equal(*found)
    assert engine_note(ours).startswith("engine: transformers, since ")


def test_changed_weights_are_read() -> None:
    stock, ours = served("mistral")
    ids = prompts("left")["input_ids"][1:2]
    ours.generate(ids, max_new_tokens=3, do_sample=False)
    for model in (stock, ours):
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    results = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (stock, ours)]
    assert torch.equal(*results)


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_weights_with_an_adapter(storage: str) -> None:
    """The tokens are those of transformers' loop over the same model."""
    model: Any = tiny_model("llama", amplify=2.0).eval()
    quantize_linears(model, storage)
    apply(model, methods=CausalLMMethods)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    asked: dict[str, Any] = {**prompts(), "max_new_tokens": 8, "do_sample": False}
    expected = peft.generate(**asked)
    state_of(model).engine = DecodeEngine(("cpu", "cuda"))
    assert torch.equal(peft.generate(**asked), expected) and engine_note(model) == "engine: hasten"
