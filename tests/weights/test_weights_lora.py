"""Every kind of PEFT wrapper: read right, or named as a reason; never silently left out."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hasten.testing import tiny_model
from hasten.weights import base_layer_of, read_linear, read_lora, unwrap


def _worn(model_type: str = "llama", **config: Any) -> Any:
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(tiny_model(model_type), LoraConfig(**config)).eval()


def _q(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def _computes(module: Any, training: bool = False) -> None:
    """What `read_linear` returns computes what the module computes."""
    base, pair, reason = read_linear(module, training)
    assert reason is None
    x = torch.randn(3, base.in_features)
    expected = base(x)
    if pair is not None:
        expected = expected + pair.scale * (x @ pair.a_RE.T) @ pair.b_VR.T
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_alpha": 3}, {"bias": "all"}])
def test_plain_lora_is_read(config: dict[str, Any]) -> None:
    module = _q(_worn(**config))
    base, pair, reason = read_linear(module, training=True)
    assert type(base) is nn.Linear
    assert pair is not None
    assert reason is None
    assert pair.scale == module.scaling["default"]
    _computes(module)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "bias on lora_B"),
    ],
)
def test_variants_are_reasons(config: dict[str, Any], reason: str) -> None:
    module = _q(_worn("qwen2", **config))
    assert reason in str(read_lora(module, training=False)[1])
    base, pair, why = read_linear(module, training=False)
    assert (base, pair) == (None, None)
    assert reason in str(why)


def test_dropout_is_a_reason_only_in_training() -> None:
    module = _q(_worn(lora_dropout=0.5))
    assert read_linear(module, training=True)[2] == "lora_dropout > 0"
    _computes(module)


def test_two_adapters() -> None:
    model = _worn()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    _computes(_q(model))
    model.set_adapter("other")
    _computes(_q(model))
    assert read_lora(_q(model), False)[0].a_RE.shape[0] == 2
    model.base_model.set_adapter(["default", "other"])
    assert read_lora(_q(model), False) == (None, "2 adapters act at once")


def test_adapter_that_another_layer_has() -> None:
    model = _worn()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert read_lora(_q(model), False) == (None, None)
    _computes(_q(model))


def test_disabled_and_merged() -> None:
    model = _worn()
    module = _q(model)
    with model.disable_adapter():
        assert read_lora(module, False) == (None, None)
        _computes(module)
    model.merge_adapter()
    assert read_lora(module, False) == (None, None)
    _computes(module)
    module.enable_adapters(False)
    base, pair, reason = read_linear(module, False)
    assert (base, pair) == (None, None)
    assert reason == "adapters disabled while merged"


def test_modules_to_save_gives_the_copy_that_runs() -> None:
    model = _worn(modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    copy = wrapper.modules_to_save["default"]
    assert base_layer_of(wrapper) is copy
    nn.init.normal_(copy.weight)
    _computes(wrapper)
    with model.disable_adapter():
        assert base_layer_of(wrapper) is wrapper.original_module
        _computes(wrapper)


def test_copy_of_an_inactive_adapter_is_passed_over() -> None:
    model = _worn(modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    wrapper = model.base_model.model.lm_head
    nn.init.normal_(wrapper.modules_to_save["default"].weight)
    assert base_layer_of(wrapper) is wrapper.original_module
    _computes(wrapper)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_trained_token_rows_are_a_reason(model_type: str) -> None:
    model = _worn(model_type, trainable_token_indices={"embed_tokens": [3, 5]})
    modules = [model.get_input_embeddings()]
    if model_type == "gemma2":  # tied: PEFT wraps the head with the same rows
        modules.append(model.get_output_embeddings())
    for module in modules:
        stock, layers = unwrap(module)
        assert isinstance(stock, (nn.Embedding, nn.Linear))
        assert len(layers) == 1
        assert read_lora(module, False) == (None, "single trained token rows")
        assert read_linear(module, False)[2] == "single trained token rows"


def test_lora_on_an_embedding_is_a_reason() -> None:
    model = _worn(target_modules=["embed_tokens", "q_proj"])
    assert read_lora(model.get_input_embeddings(), False) == (None, "LoRA on an embedding")


def test_other_kinds_of_adapter_are_a_reason() -> None:
    from peft import IA3Config

    model = get_peft_model(
        tiny_model("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    assert "adapter of type" in str(read_linear(_q(model), False)[2])


def test_quantised_base_is_a_reason() -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64)
    assert read_linear(layer, False) == (None, None, "held as Linear4bit")


def test_bare_linear() -> None:
    layer = nn.Linear(4, 4)
    assert read_linear(layer, True) == (layer, None, None)
    assert unwrap(layer) == (layer, [])
