"""The KV cache has the name that the installed transformers gives it; the name before 5.24 works where stock takes it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from hasten.overlays.cache_name import CACHE, OLD_CACHE
from hasten.overlays.fused_output import FusedLossOutput
from hasten.patching import apply, plan, probe
from hasten.testing import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
RENAMED = pytest.mark.skipif(CACHE == OLD_CACHE, reason="transformers before 5.24 has one name")


class Renaming(LlamaForCausalLM):
    forward = deprecate_kwarg("targets", "9.0.0", new_name="labels")(LlamaForCausalLM.forward)


def _pair(family: str) -> tuple[Any, Any]:
    stock, ours = tiny_model(family), tiny_model(family)
    apply(ours)
    return stock, ours


def _warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [one.category.__name__ for one in found if OLD_CACHE in str(one.message)]


def _prefilled(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :4], use_cache=True, **{CACHE: cache})
    return cache


@RENAMED
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_the_old_name_is_taken_as_stock_takes_it(family: str) -> None:
    """An attention takes both names, so that no layer pays for a wrapper: it cannot tell which one was used, and does not warn."""
    x = torch.linspace(-1, 1, 2 * 64).reshape(1, 2, 64)
    for part in ("model", "backbone", "layer", "attention"):
        results = []
        stock, ours = _pair(family)
        for model in (stock, ours):
            cache, layer = _prefilled(model), model.model.layers[0]
            mask = torch.zeros(1, 1, 2, 6).masked_fill(torch.ones(2, 6, dtype=torch.bool).triu(5), float("-inf"))
            inner = {"position_embeddings": model.model.rotary_emb(x, torch.tensor([[4, 5]])), "attention_mask": mask}
            calls = {
                "model": lambda m=model, c=cache: m(IDS[:, 4:], past_key_values=c).logits,
                "backbone": lambda m=model, c=cache: m.model(IDS[:, 4:], past_key_values=c)[0],
                "layer": lambda n=layer, i=inner, c=cache: n(x, past_key_values=c, **i),
                "attention": lambda n=layer, i=inner, c=cache: n.self_attn(x, past_key_values=c, **i)[0],
            }
            with torch.no_grad():
                found, kinds = _warned(calls[part])
            warns = model is stock or part in ("model", "backbone")
            assert (set(kinds) == {"FutureWarning"}) is warns and cache.layers[0].keys.shape[2] == 6, part
            results.append(found)
        assert torch.equal(*results), part


@RENAMED
def test_both_names() -> None:
    """The new one counts, as in transformers."""
    results = []
    for model in _pair("llama"):
        cache, other = _prefilled(model), DynamicCache(config=model.config)
        with torch.no_grad():
            call = lambda m=model, c=cache, o=other: m(IDS[:, 4:], cache=c, past_key_values=o).logits  # noqa: E731
            found, kinds = _warned(call)
        assert cache.get_seq_length() == 6 and other.get_seq_length() == 0
        results.append(found)
    assert torch.equal(*results)


@RENAMED
def test_generate_by_the_old_name(tmp_path: Any) -> None:
    from hasten.methods import CausalLMMethods

    model = tiny_model("llama").eval()
    apply(model, methods=CausalLMMethods)
    cache = _prefilled(model)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(IDS, **{CACHE: copy.deepcopy(cache)}, **options)
    found, kinds = _warned(lambda: model.generate(IDS, past_key_values=cache, **options))
    assert torch.equal(found, expected) and set(kinds) == {"FutureWarning"}


@pytest.mark.skipif(CACHE != OLD_CACHE, reason="transformers since 5.24 takes `cache`")
def test_a_keyword_that_stock_hands_on_is_no_cache() -> None:
    """Before 5.24 `cache` was nobody's argument here: it went on to the attention interface."""
    for model in _pair("llama"):
        cache = DynamicCache(config=model.config)
        model(IDS, cache=cache, use_cache=False)
        assert cache.get_seq_length() == 0


def test_no_call_of_hasten_uses_the_old_name() -> None:
    """Every warning is an error in the tests; here of a training loss, generation and a model type without a data file."""
    _, ours = _pair("llama")
    ours.train()(IDS, labels=IDS).loss.backward()
    ours.eval().generate(IDS, max_new_tokens=2, do_sample=False)
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("smollm3", vocab_size=99, num_key_value_heads=2, pad_token_id=0, **sizes)
    other = AutoModelForCausalLM.from_config(config)
    assert not isinstance(probe.prove("head", other), str)
    assert any(action.name == "" for action in plan(other).actions)


def test_another_renamed_argument_is_not_read_through() -> None:
    """A decorator that renames something else than the cache may change what the forward computes."""
    model = tiny_model("llama")
    model.__class__ = Renaming
    assert "a decorator" in str(probe.prove("head", model))


def test_outputs_take_and_show_the_name_of_stock() -> None:
    cache = DynamicCache()
    loss = torch.ones(())
    made = [kind(loss=loss, **{CACHE: cache}) for kind in (FusedLossOutput, CausalLMOutputWithPast)]
    assert list(made[0]) == list(made[1]) == ["loss", CACHE]
    assert all(one[CACHE] is cache and getattr(one, OLD_CACHE) is cache and OLD_CACHE in one for one in made)
    assert FusedLossOutput(loss, cache)[CACHE] is cache
    for wrong in ({"logits": loss}, {"scores": loss}):
        with pytest.raises(TypeError):
            FusedLossOutput(loss=loss, **wrong)
    with pytest.raises(TypeError):
        FusedLossOutput(loss, loss=loss)
    with pytest.raises(TypeError):
        FusedLossOutput(loss, cache, None, None, None)
