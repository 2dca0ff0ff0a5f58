"""Overlays show the stock signature and take arguments as the stock forward does: by position, by name, or refused."""

import inspect
from typing import Any

import pytest
import torch

from hasten.families import FAMILIES
from hasten.overlays.cache_name import CACHE
from hasten.patching import apply
from hasten.testing import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])
POSITIONS = torch.arange(4)[None]


def _pair(family: str) -> tuple[Any, Any]:
    stock, ours = tiny_model(family), tiny_model(family)
    apply(ours)
    return stock, ours


def _positional(module: Any) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _arguments(model: Any) -> dict[str, Any]:
    x = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 64)
    rotary = model.model.rotary_emb
    kind = {"layer_type": "full_attention"} if "layer_type" in _positional(rotary) else {}
    return {
        "hidden_states": x,
        "x": x,
        "position_embeddings": rotary(x, POSITIONS, **kind),
        "attention_mask": torch.full((1, 1, 4, 4), float("-inf")).triu(1),
        "position_ids": POSITIONS,
        CACHE: None,
        "use_cache": False,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_are_those_of_transformers(family: str) -> None:
    stock, ours = _pair(family)
    for (name, one), other in zip(stock.named_modules(), ours.modules(), strict=True):
        assert inspect.signature(one.forward) == inspect.signature(other.forward), name
    for kind in (type(ours), type(ours.model.layers[0]), type(ours.model.norm)):
        assert "self" in inspect.signature(kind.forward).parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_by_position_and_by_name(family: str) -> None:
    outputs: list[dict[str, torch.Tensor]] = []
    for model in _pair(family):
        given, layer = _arguments(model), model.model.layers[3]
        parts = {"layer": layer, "attention": layer.self_attn, "mlp": layer.mlp, "norm": layer.input_layernorm}
        found = {}
        with torch.no_grad():
            for name, part in parts.items():
                names = _positional(part)
                by_position, by_name = part(*(given[n] for n in names)), part(**{n: given[n] for n in names})
                found[f"{name} by position"] = by_position[0] if name == "attention" else by_position
                found[f"{name} by name"] = by_name[0] if name == "attention" else by_name
            mask = torch.ones_like(IDS)
            found["backbone"] = model.model(IDS, mask, POSITIONS, None, None, use_cache=False)[0]
            found["model"] = model(IDS, mask, POSITIONS, None, None, None, False, 2).logits
            loss = model.train()(IDS, mask, POSITIONS, None, None, IDS, False, 0).loss
        outputs.append({**found, "loss": loss})
    theirs, ours = outputs
    for name, expected in theirs.items():
        if name == "loss":
            torch.testing.assert_close(ours[name], expected)
        else:
            assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_what_the_stock_forward_refuses_is_refused(family: str) -> None:
    for model in _pair(family):
        given, layer = _arguments(model), model.model.layers[0]
        x, rope, mask = given["hidden_states"], given["position_embeddings"], given["attention_mask"]
        second = _positional(layer)[1]
        calls = {
            "one too many, layer": lambda: layer(x, *[None] * 9),  # noqa: B023
            "twice, layer": lambda: layer(x, rope, **{second: rope}),  # noqa: B023
            "one too many, attention": lambda: layer.self_attn(x, rope, mask, None, None),  # noqa: B023
            "one too many, mlp": lambda: layer.mlp(x, x),  # noqa: B023
            "unknown, mlp": lambda: layer.mlp(y=x),  # noqa: B023
            "one too many, norm": lambda: layer.input_layernorm(x, x),  # noqa: B023
            "one too many, model": lambda: model(IDS, *[None] * 12),  # noqa: B023
            "one too many, backbone": lambda: model.model(IDS, *[None] * 9),  # noqa: B023
        }
        for name, call in calls.items():
            with pytest.raises(TypeError):
                call()
                pytest.fail(name)
        with pytest.raises((TypeError, ValueError)):  # without rotation: nothing that transformers computes
            layer.self_attn(x, None, mask)
