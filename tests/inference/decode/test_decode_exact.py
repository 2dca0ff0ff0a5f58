"""Tokens of the engine are transformers' in fp32: every family, long ragged prompts, and every way of sampling."""

from typing import Any

import pytest
import torch
from decode_kit import both, prompts, served

from hasten.families import FAMILIES

LONG: dict[str, Any] = {"max_position_embeddings": 1024}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_longer_than_windows_and_blocks(family: str) -> None:
    """Ragged, with windows of 8: a prompt of two blocks, one that fills the first block while decoding, a short one."""
    stock, ours = served(family, **LONG)
    batch = prompts(lengths=(251, 300, 9))
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0, "top_k": 40}):
        assert torch.equal(*both(stock, ours, **batch, max_new_tokens=12, eos_token_id=None, **how))
    alone = prompts(lengths=(251,), seed=8)
    assert torch.equal(*both(stock, ours, **alone, max_new_tokens=12, do_sample=False, eos_token_id=None))


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0, "top_k": 7},
    {"top_p": 0.4},
    {"min_p": 0.2},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02},
    {"top_k": 0, "top_p": 1.0},
    {"num_return_sequences": 3, "temperature": 2.0},
    {"repetition_penalty": 1.8, "top_p": 0.9, "top_k": 30, "temperature": 0.7},
    {"renormalize_logits": True, "top_k": 4},
]
PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 0.4},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 2.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[one] for one in range(0, 280, 2)]},
    {"suppress_tokens": list(range(0, 280, 3))},
    {"begin_suppress_tokens": list(range(0, 280, 2))},
    {"forced_eos_token_id": 9},
    {"sequence_bias": [[[44], 20.0]]},
    {"exponential_decay_length_penalty": (2, 1.5)},
    {"guidance_scale": 1.7},
    {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 3.0}},
    {"remove_invalid_values": True},
]


@pytest.mark.parametrize("how", SAMPLING, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_samples_of_a_seed_are_stocks(family: str, how: dict[str, Any]) -> None:
    stock, ours = served(family)
    assert torch.equal(*both(stock, ours, **prompts(), max_new_tokens=16, do_sample=True, **how))


@pytest.mark.parametrize("how", PROCESSORS, ids=lambda how: next(iter(how)))
def test_processors_of_transformers(how: dict[str, Any]) -> None:
    stock, ours = served("qwen2")
    plain, found = (
        both(stock, ours, **prompts(), max_new_tokens=10, do_sample=False, **setting) for setting in ({}, how)
    )
    assert torch.equal(*found)
    assert {"remove_invalid_values", "encoder_no_repeat_ngram_size"} & set(how) or not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("minimum", [None, 5])
@pytest.mark.parametrize("pad", [0, 17])
def test_ends_of_sequences(minimum: int | None, pad: int) -> None:
    """Several EOS ids, another pad id, a pad id that is an EOS, and a minimum length."""
    stock, ours = served("granite")
    for eos in ([17, 3, 200], list(range(0, 288, 4)), list(range(9, 288))):
        asked = {"eos_token_id": eos, "pad_token_id": pad, "min_new_tokens": minimum}
        for how in ({"do_sample": False}, {"do_sample": True}):
            assert torch.equal(*both(stock, ours, **prompts(), max_new_tokens=12, **asked, **how))


def test_no_pad_token() -> None:
    stock, ours = served("llama", pad_token_id=None)
    assert torch.equal(
        *both(stock, ours, **prompts(lengths=(6, 6)), max_new_tokens=12, eos_token_id=list(range(0, 288, 4)))
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"max_length": 14},
        {"max_new_tokens": 1},
        {},
        {"min_length": 20, "max_length": 25, "eos_token_id": list(range(0, 288, 2))},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning:transformers")
def test_lengths(asked: dict[str, Any]) -> None:
    stock, ours = served("llama")
    assert torch.equal(*both(stock, ours, **prompts(), do_sample=False, **asked))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_another_type_and_without_a_mask(dtype: torch.dtype) -> None:
    """Without a mask padding is inferred from the pad id; a prompt by position; no prompt at all."""
    stock, ours = served("cohere")
    ids = prompts()["input_ids"].to(dtype)
    wanted, found = both(stock, ours, input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    assert torch.equal(*(model.generate(ids, max_new_tokens=6, do_sample=False) for model in (stock, ours)))
    assert torch.equal(*both(stock, ours, max_new_tokens=6, do_sample=False))
    before = ids.clone()
    ours.generate(ids, max_new_tokens=6)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3", "dynamic", "longrope"])
def test_rope_scaling(rope: str) -> None:
    """Past the checkpoint's own context. Types whose frequencies depend on the length go to transformers."""
    settings: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": rope, "factor": 4.0}
    if rope in ("yarn", "llama3", "longrope"):
        settings["original_max_position_embeddings"] = 16
    if rope == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope == "longrope":
        settings |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    stock, ours = served("llama", max_position_embeddings=16, rope_parameters=settings)
    asked = {**prompts(), "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    if rope in ("dynamic", "longrope"):
        assert torch.equal(*(model.generate(**asked) for model in (stock, ours)))
    else:
        assert torch.equal(*both(stock, ours, **asked))
