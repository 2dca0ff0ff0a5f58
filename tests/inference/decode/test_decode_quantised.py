"""int8 and FP8 caches: chosen by transformers' own arguments, a scale per token and head, and a bounded error."""

from typing import Any

import pytest
import torch
from decode_kit import both, engine_note, prompts, served
from transformers import GenerationConfig

from hasten.errors import OptionError
from hasten.inference.decode import DecodeEngine
from hasten.ops.decode_attention import LARGEST, CacheView, decode_attention, write_cache
from hasten.overlays.cache_name import CACHE
from hasten.state import state_of

BACKENDS = {"hasten-int8": torch.int8, "hasten-fp8": torch.float8_e4m3fn}
ATTENTION_ERROR = {
    (torch.int8, 1): 0.01, (torch.int8, 10): 0.03, (torch.int8, 30): 0.08,
    (torch.float8_e4m3fn, 1): 0.04, (torch.float8_e4m3fn, 10): 0.04, (torch.float8_e4m3fn, 30): 0.04,
}  # fmt: skip
"""Largest relative error (Frobenius) of attention over a quantised cache of normal keys and values, a channel of the keys
so much larger, as real keys have."""
LOGITS_ERROR = {torch.int8: 0.02, torch.float8_e4m3fn: 0.08}


def view(tokens: int, heads: int, channels: int, dtype: torch.dtype) -> CacheView:
    blocks = [torch.empty(2, 2, heads, 64, channels).to(dtype).zero_() for _ in range(-(-tokens // 64))]
    scales = [torch.full((2, 2, heads, 64), float("nan")) for _ in blocks] if dtype in LARGEST else []
    counters = [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
    return CacheView(blocks, torch.zeros(8, dtype=torch.int64), *counters, scales=scales)


@pytest.mark.parametrize(("dtype", "outlier"), ATTENTION_ERROR, ids=str)
def test_attention_over_a_quantised_cache(dtype: torch.dtype, outlier: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, h, 128, generator=generator) for h in (4, 2, 2))
    k[..., 3] *= outlier
    exact, lossy = (view(150, 2, 128, kind) for kind in (torch.float32, dtype))
    for cache in (exact, lossy):
        write_cache(k, v, cache)
        cache.slots_B.fill_(149)
    pair = [decode_attention(q[:, -1:], cache, 128**-0.5) for cache in (exact, lossy)]
    error = float((pair[1] - pair[0]).norm() / pair[0].norm())
    assert 1e-5 < error < ATTENTION_ERROR[dtype, outlier]


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_each_token_and_head_has_its_own_scale(dtype: torch.dtype) -> None:
    """A token 10,000 times as large leaves the others' precision as it was; zeros stay zeros."""
    k = torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(0))
    k[:, 1] *= 1e4
    k[0, 2], k[1, 3, 1] = 0, 1e-30
    cache = view(5, 2, 16, dtype)
    write_cache(k, k, cache)
    read = cache.blocks[0].float() * cache.scales[0][..., None]
    got = read[0, :, :, :5].transpose(1, 2)
    assert torch.equal(got, read[1, :, :, :5].transpose(1, 2))
    limit = k.abs().amax(-1, keepdim=True) * (0.5 / 127 if dtype == torch.int8 else 2**-4)
    assert ((got - k).abs() <= limit).all()
    assert cache.scales[0][:, :, :, 5:].isnan().all()  # nothing else was written


def asked(backend: str) -> dict[str, Any]:
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["arguments", "config", "model", "engine"])
def test_a_call_chooses_its_cache(backend: str, where: str) -> None:
    stock, ours = served("llama")
    batch, how = prompts(lengths=(5, 290, 20)), {"max_new_tokens": 6, "do_sample": False}
    record = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    exact = stock.generate(**batch, **how, **record)
    if where == "arguments":
        found = ours.generate(**batch, **how, **record, **asked(backend))
    elif where == "config":
        config = GenerationConfig(**how, **record, **asked(backend))
        found = ours.generate(**batch, generation_config=config)
        assert config.cache_config == {"backend": backend}
    elif where == "model":
        ours.generation_config.update(**asked(backend))
        found = ours.generate(**batch, **how, **record)
    else:
        state_of(ours).engine = DecodeEngine(("cpu",), cache=BACKENDS[backend])
        found = ours.generate(**batch, **how, **record)
    assert engine_note(ours) == "engine: hasten"
    (cache, _), *others = state_of(ours).engine._steps._kept.values()  # pyright: ignore
    assert cache.shape.dtype is BACKENDS[backend] and not others
    torch.testing.assert_close(found.logits[0], exact.logits[0], rtol=2e-5, atol=2e-5)  # the prompt itself is exact
    error = float((found.logits[1] - exact.logits[1]).norm() / exact.logits[1].norm())
    assert 1e-5 < error < LOGITS_ERROR[BACKENDS[backend]]
    assert found[CACHE].layers[0].keys.dtype == torch.float32


def test_a_quantised_cache_is_continued() -> None:
    _, ours = served("gemma2")
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **asked("hasten-int8")}
    first = ours.generate(**prompts(lengths=(20,)), **how)
    whole = ours.generate(first.sequences, **how)
    second = ours.generate(first.sequences, **{CACHE: first[CACHE]}, **how)
    assert torch.equal(second.sequences, whole.sequences)


@pytest.mark.parametrize("other", [{"num_beams": 2}, {"output_hidden_states": True}], ids=str)
def test_what_only_transformers_serves_raises(other: dict[str, Any]) -> None:
    _, ours = served("llama")
    with pytest.raises(OptionError, match="quantised cache was asked for"):
        ours.generate(**prompts(), max_new_tokens=3, **asked("hasten-int8"), **other)
    with pytest.raises(OptionError, match="nbits"):
        config = {"backend": "hasten-int8", "nbits": 4}
        ours.generate(**prompts(), max_new_tokens=3, cache_implementation="quantized", cache_config=config)
    state_of(ours).engine = None
    with pytest.raises(ValueError, match="hasten-int8"):  # transformers' own error, on the stock engine
        ours.generate(**prompts(), max_new_tokens=3, **asked("hasten-int8"))


def test_transformers_backends_stay_transformers() -> None:
    stock, ours = served("llama")
    results: list[Any] = []
    for model in (stock, ours):
        try:
            results.append(model.generate(**prompts(), max_new_tokens=4, do_sample=False, **asked("fp8")))
        except ValueError as error:  # older transformers have no such backend
            results.append(str(error))
    assert results[0] == results[1] if isinstance(results[0], str) else torch.equal(*results)
    assert "cache_implementation='quantized'" in engine_note(ours)
    assert torch.equal(*both(stock, ours, **prompts(), max_new_tokens=4, cache_implementation="dynamic"))


def test_the_note_says_that_a_call_is_not_quantised() -> None:
    _, ours = served("llama")
    state_of(ours).engine = DecodeEngine(("cpu",), cache=torch.int8)
    ours.generate(**prompts(), max_new_tokens=3, num_beams=2)
    assert engine_note(ours).endswith("; its keys and values are not quantised")
