"""Every kind of PEFT wrapper: read right, or named as a reason; never silently left out."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hasten.ops.lora import LoraLinear, lora_linears
from hasten.patching import apply
from hasten.testing import tiny_model
from hasten.weights import base_layer_of, read_head, read_linear, read_lora, unwrap


def _worn(model_type: str = "llama", **config: Any) -> Any:
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(tiny_model(model_type), LoraConfig(**config)).eval()


def _q(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def _computes(module: Any, training: bool = False) -> None:
    """What `read_linear` returns computes what the module computes."""
    linear = read_linear(module, training)
    assert isinstance(linear, LoraLinear)
    x = torch.randn(3, linear.weight.shape[1])
    torch.testing.assert_close(module(x), lora_linears(x, (linear,))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_alpha": 3}, {"bias": "all"}])
def test_plain_lora_is_read(config: dict[str, Any]) -> None:
    module = _q(_worn(**config))
    linear = read_linear(module, training=True)
    assert isinstance(linear, LoraLinear)
    assert type(base_layer_of(module)) is nn.Linear
    assert linear.weight.stored is base_layer_of(module).weight
    assert linear.a is module.lora_A["default"].weight and linear.b is module.lora_B["default"].weight
    assert linear.scale == module.scaling["default"]
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
    assert reason in str(read_linear(module, training=False))
    assert isinstance(read_linear(module, training=False), str)


def test_dropout_is_a_reason_only_in_training() -> None:
    module = _q(_worn(lora_dropout=0.5))
    assert read_linear(module, training=True) == "lora_dropout > 0"
    _computes(module)


def test_two_adapters() -> None:
    model = _worn()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    _computes(_q(model))
    model.set_adapter("other")
    _computes(_q(model))
    assert read_lora(_q(model), False)[0].a_RE.shape[0] == 2
    model.base_model.set_adapter(["default", "other"])
    assert read_lora(_q(model), False) == (None, "2 adapters are active at once")


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
    assert read_linear(module, False) == "adapters disabled while merged"


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
        assert read_lora(module, False) == (None, "trained rows of single tokens")
        assert read_linear(module, False) == "trained rows of single tokens"


def test_lora_on_an_embedding_is_a_reason() -> None:
    model = _worn(target_modules=["embed_tokens", "q_proj"])
    assert read_lora(model.get_input_embeddings(), False) == (None, "LoRA on an embedding")


def test_other_kinds_of_adapter_are_a_reason() -> None:
    from peft import IA3Config

    model = get_peft_model(
        tiny_model("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    assert "adapter of type" in str(read_linear(_q(model), False))


def test_a_quantised_head_is_a_reason() -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert read_head(layer, False) == "stored as Linear4bit, not quantised yet"
    layer.weight = layer.weight.to("cpu")
    assert read_head(layer, False) == "stored as Linear4bit"
    assert isinstance(read_linear(layer, False), LoraLinear)
    assert read_linear(bnb.nn.Linear8bitLt(64, 64), False) == "stored as Linear8bitLt"


def test_bare_linear() -> None:
    layer = nn.Linear(4, 4)
    linear = read_linear(layer, True)
    assert isinstance(linear, LoraLinear)
    assert linear.weight.stored is layer.weight and linear.bias is layer.bias
    assert linear.a is None and linear.b is None
    assert unwrap(layer) == (layer, [])


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *a: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *a: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
}


@pytest.mark.parametrize("read", [read_linear, read_head])
@pytest.mark.parametrize("part", ["wrapper", "base", "A", "B"])
@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_hooks_are_a_reason_until_they_are_removed(hook: str, part: str, read: Any) -> None:
    module = _q(_worn())
    a, b = module.lora_A["default"], module.lora_B["default"]
    handle = HOOKS[hook]({"wrapper": module, "base": module.base_layer, "A": a, "B": b}[part])
    assert "hooks on the" in read(module, True)
    handle.remove()
    assert isinstance(read(module, True), LoraLinear)


def test_an_own_forward_is_a_reason() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert read_linear(layer, True) == read_head(layer, True) == "hooks on the module"


@pytest.mark.parametrize("offload", [False, True])
def test_accelerates_hook_is_no_reason_for_a_head_that_moves_its_input_itself(offload: bool) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layer = nn.Linear(4, 4)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=offload))
    assert read_linear(layer, True) == "hooks on the module"
    assert isinstance(read_head(layer, True), str) == offload


def test_parametrizations_are_a_reason() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert isinstance(read_linear(layer, True), str)


def test_an_embedding_and_an_unknown_format_are_reasons() -> None:
    assert read_linear(nn.Embedding(4, 4), True) == "stored as Embedding"
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int16), requires_grad=False)
    assert read_linear(layer, True) == "stored as Linear"


def test_a_watched_head_runs_as_the_module_that_it_is() -> None:
    """A hook on the head sees logits in training too, though the loss is fused, and the loss stays what it is."""
    model: Any = tiny_model("llama")
    apply(model)
    ids = torch.arange(20, 40)[None]
    expected = model.train()(ids, labels=ids).loss
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits))
    loss = model(ids, labels=ids).loss
    assert seen and seen[0].shape[-1] == model.config.vocab_size
    torch.testing.assert_close(loss, expected)
