"""The attention context: one object per forward, in the place of a dense mask, the caller's own, on other devices."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers_kit import recompute

from hasten.families import FAMILIES
from hasten.overlays import AttentionContext, AttentionOverlay, SpanAttention, StockAttention
from hasten.overlays.context import placeholder_mask
from hasten.patching import apply, plan
from hasten.testing import tiny_model

IDS = torch.arange(6, 30)[None]


@dataclass(frozen=True)
class Counting(AttentionContext):
    """Plain causal attention that counts its calls: a context of one class in one place, as a static cache will be."""

    layers: list[int]

    def attend(self, module: Any, qkv: Any, attention_mask: Any, past_key_values: Any, kwargs: Any) -> Any:
        self.layers.append(module.layer_idx)
        return SpanAttention(None).attend(module, qkv, attention_mask, past_key_values, kwargs)

    def to(self, device: Any, non_blocking: bool = False) -> "Counting":
        return self


@pytest.mark.parametrize("name", FAMILIES)
def test_the_callers_context_reaches_every_attention(name: str) -> None:
    stock = tiny_model(name)
    ours = copy.deepcopy(stock)
    apply(ours)
    mine = Counting([])
    with torch.no_grad():
        logits = ours(IDS, attention_context=mine, use_cache=False).logits
        torch.testing.assert_close(logits, stock(IDS).logits, rtol=2e-5, atol=2e-4)
    assert mine.layers == list(range(4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_sees_the_same_context(reentrant: bool) -> None:
    model = tiny_model("llama").train()
    apply(model)
    recompute(model, use_reentrant=reentrant)
    mine = Counting([])
    model(inputs_embeds=model.get_input_embeddings()(IDS), labels=IDS, attention_context=mine).loss.backward()
    assert mine.layers == [0, 1, 2, 3, 3, 2, 1, 0]


def test_no_dense_mask_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    model = tiny_model("cohere2")
    apply(model)
    built: list[Any] = []
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kwargs: built.append(kwargs)
    )
    model(IDS, attention_mask=torch.tensor([[0] * 4 + [1] * 20]), attention_context=Counting([]), use_cache=False)
    assert not built
    model(IDS, attention_mask=torch.tensor([[0] * 4 + [1] * 20]), use_cache=False)
    assert built


def test_contexts_move_between_devices() -> None:
    plain, spans = SpanAttention(None), SpanAttention(torch.zeros(1, 4, 3, dtype=torch.int32))
    stock = StockAttention()
    assert plain.to("meta") is plain and stock.to("meta") is stock
    assert spans.to("cpu", non_blocking=True) is spans
    moved = spans.to("meta").spans_BT3
    assert moved is not None and moved.device.type == "meta"


def test_an_attention_that_ignores_contexts_never_computes_silently() -> None:
    """The placeholder fits no scores."""
    for backend in ("eager", "sdpa"):
        model = tiny_model("llama", attn_implementation=backend)
        with pytest.raises((RuntimeError, IndexError)):
            model(IDS, attention_mask=placeholder_mask(IDS))


def test_a_layer_whose_attention_keeps_its_class_keeps_transformers_attention() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[2].self_attn
    attention.__class__ = Other = type("Other", (type(attention),), {"__module__": __name__})
    globals()["Other"] = Other  # a class of a module of the user's own
    try:
        planned = plan(model)
    finally:
        del globals()["Other"]
    assert [(skip.name, skip.kind) for skip in planned.skips] == [("model.layers.2.self_attn", "Other")]
    backbone = next(action for action in planned.actions if action.name == "model")
    assert backbone.overlay_config.replaces is None and "attention of 1" in backbone.overlay_config.reason
    apply(model, planned)
    assert sum(isinstance(module, AttentionOverlay) for module in model.modules()) == 3
