"""The merged checkpoint computes what the adapter on the 16-bit base computes, and is the base wherever nothing was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from export_kit import (
    ALL,
    IDS,
    INT8,
    NF4,
    adapt,
    base_folder,
    close,
    config,
    contents,
    fresh_logits,
    load,
    logits,
    tensors,
    train,
)
from peft import LoraConfig

from hasten.export import save_merged
from hasten.testing import tiny_tokenizer
from hasten.weights import dequantize

FAMILIES = ["llama", "gemma2", "cohere", "qwen2"]


def test_fresh_process_gets_the_adapters_logits(tmp_path: Path) -> None:
    """fp32, so that equality can be asked for: adapter on the dense base against the merge of the same adapter."""
    expected, folders = [], []
    for model_type in FAMILIES:
        base = base_folder(tmp_path / model_type / "base", model_type)
        model = adapt(load(base), use_rslora=True)
        expected.append(logits(model))
        save_merged(model, tmp_path / model_type / "merged", tiny_tokenizer(), max_shard_size="90KB")
        folders.append(tmp_path / model_type / "merged")
        assert (expected[-1] - logits(load(base))).abs().max() > 1e-2, "the adapter does nothing"
    for model_type, got, want in zip(FAMILIES, fresh_logits(folders, tmp_path), expected, strict=True):
        close(got, want), model_type


def test_qlora_merges_onto_the_unquantised_base(tmp_path: Path) -> None:
    """The same adapter on NF4, on int8 and on the dense base gives the same bytes."""
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter: dict[str, torch.Tensor] = {}
    for kind, quantisation in {"dense": None, "nf4": NF4, "int8": INT8}.items():
        model = adapt(load(base, quantisation))
        if kind == "dense":
            adapter = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        else:
            with torch.no_grad():
                for name, value in adapter.items():
                    model.get_parameter(name).copy_(value)
            logits(model)  # a forward may repack the codes; the merge must not mind
        save_merged(model, tmp_path / kind, max_shard_size="90KB")
    assert contents(tmp_path / "nf4") == contents(tmp_path / "dense")
    assert contents(tmp_path / "int8") == contents(tmp_path / "dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_target_is_the_fp32_sum_cast_once_and_all_else_is_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    base = base_folder(tmp_path / "base", "qwen2", dtype=dtype)
    model = adapt(load(base, NF4), target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    save_merged(model, tmp_path / "out", max_shard_size="50KB")
    old, new = tensors(base), tensors(tmp_path / "out")
    assert sorted(old) == sorted(new)
    changed = 0
    for name, tensor in old.items():
        assert new[name].dtype == dtype
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            wanted = tensor.float() + layer.scaling["default"] * (b.float() @ a.float())
            torch.testing.assert_close(new[name], wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
            assert not torch.equal(new[name], tensor)
            changed += 1
        else:
            assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert changed == 8
    assert config(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config(tmp_path / "out")


def test_dtype_casts_all_floating_tensors(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    save_merged(adapt(load(base)), tmp_path / "out", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert config(tmp_path / "out")["dtype"] == "bfloat16"


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}),
    "bias": ("qwen2", {"bias": "all"}),
    "bias of targets": ("qwen2", {"bias": "lora_only"}),
    "bias on B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "scaled embedding": ("gemma", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "dora embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "trained copies": ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "token rows": ("llama", {"trainable_token_indices": {"embed_tokens": [7, 9, 250]}}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter(tmp_path: Path, kind: str) -> None:
    model_type, asked = ADAPTERS[kind]
    base = base_folder(tmp_path / "base", model_type)
    model = adapt(load(base), **asked)
    expected = logits(model)
    save_merged(model, tmp_path / "out")
    close(logits(load(tmp_path / "out")), expected)
    assert (expected - logits(load(base))).abs().max() > 1e-2
    assert torch.equal(logits(model), expected), "the live model was changed"


def test_adapter_that_was_fitted_to_quantised_weights_is_merged_onto_them(tmp_path: Path) -> None:
    """LoftQ's adapter makes up for the quantisation error: on the unquantised base it would add the error back."""
    base = base_folder(tmp_path / "base")
    model = adapt(load(base, NF4), target_modules=["q_proj", "up_proj"])
    model.peft_config["default"].init_lora_weights = "loftq"
    save_merged(model, tmp_path / "out")
    new, old = tensors(tmp_path / "out"), tensors(base)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        wanted = dequantize(layer.base_layer, torch.float32) + layer.get_delta_weight("default")
        torch.testing.assert_close(new[name], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(new["model.layers.0.self_attn.v_proj.weight"], old["model.layers.0.self_attn.v_proj.weight"])


@pytest.mark.parametrize("quantisation", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]], ids="+".join)
def test_several_adapters_only_the_active_ones(tmp_path: Path, active: list[str], quantisation: Any) -> None:
    base = base_folder(tmp_path / "base")
    model = adapt(load(base, quantisation), target_modules=["q_proj", "v_proj"], use_dora=quantisation is None)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=quantisation is None))
    model.base_model.set_adapter(active)
    train(model, seed=1)
    save_merged(model, tmp_path / "out")
    if quantisation is None:
        close(logits(load(tmp_path / "out")), logits(model))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    if quantisation is not None:
        name = "model.layers.0.self_attn.q_proj.weight"
        wanted = tensors(base)[name] + sum(layer.get_delta_weight(adapter) for adapter in active)
        torch.testing.assert_close(tensors(tmp_path / "out")[name], wanted, rtol=1e-5, atol=1e-6)


def test_twice_gives_the_same_bytes_and_replaces_only_when_done(tmp_path: Path) -> None:
    model = adapt(load(base_folder(tmp_path / "base"), NF4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_merged(model, tmp_path / "out", tiny_tokenizer(), max_shard_size="70KB")
    first = contents(tmp_path / "out")
    save_merged(model, tmp_path / "out", tiny_tokenizer(), max_shard_size="70KB")
    assert contents(tmp_path / "out") == first
    save_merged(model, tmp_path / "again", tiny_tokenizer(), max_shard_size="70KB")
    assert contents(tmp_path / "again") == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "base", "out"]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_full_fine_tuning_is_saved_as_it_is(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "gemma2", dtype=torch.bfloat16)
    model = load(base, dtype=torch.float32)  # fp32 master weights of a bf16 checkpoint
    train(model.requires_grad_(True))
    save_merged(model, tmp_path / "out")
    new = tensors(tmp_path / "out")
    assert sorted(new) == sorted(tensors(base))
    live = model.state_dict()
    assert all(torch.equal(tensor, live[name].bfloat16()) for name, tensor in new.items())


def test_model_built_in_memory(tmp_path: Path) -> None:
    from hasten.testing import tiny_model

    model = adapt(tiny_model("qwen3"), target_modules=ALL)
    save_merged(model, tmp_path / "out")
    close(logits(load(tmp_path / "out")), logits(model))


def test_prequantised_base_is_dequantised_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(base_folder(tmp_path / "base"), NF4).save_pretrained(tmp_path / "nf4")
    model = adapt(load(tmp_path / "nf4"))
    save_merged(model, tmp_path / "out")
    assert "quantisation error" in caplog.text
    with torch.no_grad():
        expected = model.train()(IDS).logits  # in eval mode bitsandbytes' CPU kernel computes in bf16
    close(logits(load(tmp_path / "out")), expected)
    assert "quantization_config" not in config(tmp_path / "out")


def test_grown_vocabulary_keeps_its_rows(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    model = load(base, dtype=torch.bfloat16)  # coarser than the base, whose rows must come through unrounded
    model.resize_token_embeddings(300, mean_resizing=False)
    model = adapt(model, target_modules=["q_proj"])
    save_merged(model, tmp_path / "out")
    new, old = tensors(tmp_path / "out"), tensors(base)
    for name, live in (
        ("model.embed_tokens.weight", model.get_input_embeddings()),
        ("lm_head.weight", model.get_output_embeddings()),
    ):
        assert new[name].shape == (300, 64)
        assert torch.equal(new[name][:288], old[name])
        assert torch.equal(new[name][288:], live.weight[288:].float())
    assert config(tmp_path / "out")["vocab_size"] == 300


def test_rope_scaling_and_generation_config_are_those_of_the_model(tmp_path: Path) -> None:
    model = load(base_folder(tmp_path / "base"))
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model.config.use_cache = False  # as a trainer leaves it
    model.generation_config.max_new_tokens = 7
    save_merged(adapt(model), tmp_path / "out")
    assert config(tmp_path / "out")["rope_parameters"]["factor"] == 2.0
    assert config(tmp_path / "out")["use_cache"] is True
    assert load(tmp_path / "out").generation_config.max_new_tokens == 7


def test_tokenizer_is_saved_as_given(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ messages[0]['content'] }}")
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path / "given")
    save_merged(adapt(load(base_folder(tmp_path / "base"))), tmp_path / "out", tokenizer)
    saved = contents(tmp_path / "out")
    given = contents(tmp_path / "given")
    assert given
    assert {name: saved.get(name) for name in given} == given
