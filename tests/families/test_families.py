"""Every family against the installed transformers, with each option that its checkpoints use."""

import pytest

from hasten.families import FAMILIES
from hasten.patching import plan
from hasten.testing import check_family, tiny_config, tiny_model
from hasten.testing.tiny import FAMILY_CONFIGS

BASE_ROPE = {"rope_theta": 10000.0}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, **BASE_ROPE},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **BASE_ROPE},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        **BASE_ROPE,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **BASE_ROPE},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
        **BASE_ROPE,
    },
}
VARIANTS = {
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 4}),
    "llama beyond its context": ("llama", {"max_position_embeddings": 16}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2 without window": ("qwen2", {"use_sliding_window": False}),
    "qwen3 with bias, no window": ("qwen3", {"use_sliding_window": False, "attention_bias": True}),
    "gemma2 untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma2 without softcaps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3 without softcap": ("gemma3_text", {"final_logit_softcapping": None}),
    "cohere without q/k norm": ("cohere", {"use_qk_norm": False}),
    "cohere without bias": ("cohere", {"attention_bias": False}),
    "cohere2 all full": ("cohere2", {"layer_types": ["full_attention"] * 4}),
    "granite tied with biases": ("granite", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    **{f"llama {name} rope": ("llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(name: str) -> None:
    check_family(FAMILIES[name], quantized=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_transformers(variant: str) -> None:
    name, changes = VARIANTS[variant]
    check_family(FAMILIES[name], tiny_model(name, **changes))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "gemma2"])
def test_both_attention_backends(name: str, backend: str) -> None:
    check_family(FAMILIES[name], tiny_model(name, attn_implementation=backend))


def test_every_tiny_model_has_every_fact_away_from_neutral() -> None:
    """Otherwise a flipped fact could pass: a window as long as the rows, a scale of one, a softcap out of reach."""
    assert FAMILY_CONFIGS.keys() == FAMILIES.keys()
    for name in FAMILIES:
        model = tiny_model(name)
        actions = {action.overlay.runs: action.overlay_config for action in plan(model).actions}
        window = getattr(tiny_config(name), "sliding_window", None)
        assert window is None or window < 40
        assert float(model(input_ids=_ids()).logits.detach().std()) > 0.05
        if FAMILIES[name].head.multiplier or FAMILIES[name].head.divisor:
            assert actions["fused loss"].scale != 1.0
        if FAMILIES[name].block.multiplier:
            assert actions["decoder layer"].multiplier != 1.0


def _ids():
    import torch

    return torch.arange(6, 46)[None]
