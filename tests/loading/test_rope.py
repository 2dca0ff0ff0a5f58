"""RoPE: what the caller asks for takes effect and is saved; a longer `max_seq_length` extends what is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hasten.errors import OptionError
from hasten.families import FAMILIES
from hasten.loading import load
from hasten.loading.rope import RopePlan, plan_rope
from hasten.options import LoadOptions
from hasten.testing import save_tiny, tiny_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def planned(model_type: str, length: int, scaling: dict | None = None, **changes: Any) -> tuple[RopePlan, Any]:
    config = tiny_config(model_type, **changes)
    before = config.to_dict()
    plan = plan_rope(config, FAMILIES.get(model_type), scaling, length)
    assert config.to_dict() == before
    for name, value in plan.changes.items():
        setattr(config, name, value)
    return plan, config


def inverse_frequencies(folder: Path, **arguments: Any) -> torch.Tensor:
    return load(LoadOptions.from_call(model_name=str(folder), **arguments)).model.model.rotary_emb.inv_freq


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_length_within_the_context_changes_nothing(model_type: str) -> None:
    plan, _ = planned(model_type, 128)
    assert (plan.changes, plan.notes, plan.problems) == ({}, [], [])


def test_a_plain_checkpoint_is_extended_linearly(llama: Path) -> None:
    plan, config = planned("llama", 512)
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == 4.0
    assert config.max_position_embeddings == 128
    assert "extended from 128 to 512" in plan.notes[0]
    short, long = inverse_frequencies(llama, max_seq_length=128), inverse_frequencies(llama, max_seq_length=512)
    assert torch.equal(long, short / 4)


@pytest.mark.parametrize(
    ("own", "limit", "length", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, 128, 512, {"factor": 4.0}),
        ({"rope_type": "dynamic", "factor": 2.0}, 128, 512, {"factor": 4.0}),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, 256, {"factor": 8.0}),
        ({**LLAMA3, "original_max_position_embeddings": 8}, 128, 256, {"factor": 16.0}),
    ],
)
def test_a_scaled_checkpoint_is_extended_by_its_own_type(own: dict, limit: int, length: int, expected: dict) -> None:
    changes = {"rope_parameters": {"rope_theta": 10000.0, **own}, "max_position_embeddings": limit}
    plan, config = planned("llama", length, **changes)
    assert config.rope_parameters == {"rope_theta": 10000.0, **own, **expected}
    again = plan_rope(config, FAMILIES["llama"], None, length)
    assert not again.changes, "an extended checkpoint is not extended once more"
    within, _ = planned("llama", limit, **changes)
    assert not within.changes
    assert plan.notes


def test_longrope_stretches_its_long_factors() -> None:
    own = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}
    own["original_max_position_embeddings"] = 32
    _, config = planned("llama", 256, rope_parameters=own)
    assert config.rope_parameters["long_factor"] == [4.0] * 8
    assert config.rope_parameters["short_factor"] == [1.0] * 8
    assert config.rope_parameters["factor"] == 8.0
    assert config.max_position_embeddings == 256


def test_gemma3_extends_its_full_layers_only() -> None:
    _, config = planned("gemma3_text", 256)
    assert config.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert config.rope_parameters["full_attention"]["factor"] == 2.0
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config.max_position_embeddings == 256
    assert not plan_rope(config, FAMILIES["gemma3_text"], None, 256).changes


@pytest.mark.parametrize("model_type", ["cohere2", "mistral"])
def test_families_that_rotate_in_windows_only_need_nothing(model_type: str) -> None:
    plan, config = planned(model_type, 512)
    assert plan.changes == {"max_position_embeddings": 512}
    assert config.rope_parameters["rope_type"] == "default"
    assert "every rotated layer has a window" in plan.notes[0]


def test_a_mistral_without_window_is_extended() -> None:
    _, config = planned("mistral", 512, sliding_window=None)
    assert config.rope_parameters["rope_type"] == "linear"


@pytest.mark.parametrize(
    "asked",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        LLAMA3,
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_what_is_asked_takes_effect_and_is_saved(tmp_path: Path, asked: dict, model_type: str) -> None:
    folder = save_tiny(tmp_path / "base", model_type)
    options = LoadOptions(
        model_name=str(folder),
        max_seq_length=512,
        rope_scaling=asked,
        load_in_4bit=False,
        dtype=torch.float32,
        device_map="cpu",
    )
    model = load(options).model
    rope = model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    assert rope["rope_type"] == asked.get("rope_type", asked.get("type"))
    assert rope["factor"] == asked["factor"]
    if "original_max_position_embeddings" in rope:
        assert rope["original_max_position_embeddings"] == 128
    assert "rope_theta" in rope
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(20, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ours, theirs, stock = (m(input_ids=ids, position_ids=ids + 200).logits for m in (model, again, plain))
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, stock, atol=1e-3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rope_type": "liner", "factor": 2.0}, "did you mean linear"),
        ({"factor": 2.0}, "transformers knows default, dynamic, linear"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0}, "reaches 256 positions"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "per kind of layer"),
    ],
)
def test_what_cannot_be_asked(llama: Path, asked: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        load(LoadOptions(model_name=str(llama), max_seq_length=512, rope_scaling=asked))


def test_learned_positions_cannot_be_extended() -> None:
    config = AutoConfig.for_model("gpt2", n_positions=64)
    assert "cannot be extended" in plan_rope(config, None, None, 128).problems[0]
    assert "no rotary positions" in plan_rope(config, None, {"rope_type": "linear", "factor": 2.0}, 64).problems[0]
    assert not plan_rope(config, None, None, 64).problems
