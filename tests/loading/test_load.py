"""Each argument of from_pretrained, as far as loading serves it, takes effect."""

import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.loading import Loaded, load
from hasten.loading.device import default_dtype
from hasten.options import PLACEMENTS, LoadOptions
from hasten.testing import save_tiny
from hasten.weights import dequantize
from hasten.weights.formats import format_of

TEXT = "def f(x): return x"


def loaded(folder: Path, **arguments: Any) -> Loaded:
    return load(LoadOptions.from_call(model_name=str(folder), **{"max_seq_length": 64, **arguments}))


def notes(result: Loaded) -> str:
    return "\n".join(result.notes)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt").to(model.device)).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_equals_transformers_bit_for_bit(llama: Path, dtype: torch.dtype) -> None:
    result = loaded(llama, load_in_4bit=False, dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=dtype, device_map=DEVICE)
    assert result.model.dtype == dtype
    ours, theirs = result.model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(result.model, result.tokenizer), logits(stock, AutoTokenizer.from_pretrained(llama)))
    assert not result.model.training


@pytest.mark.parametrize("name", ["up_proj", "gate_proj"])
@pytest.mark.parametrize(("flags", "storage", "worst"), [({}, "nf4", 0.1), ({"load_in_8bit": True}, "int8", 0.02)])
def test_quantised_layers_hold_the_checkpoints_values(
    llama: Path, name: str, flags: dict, storage: str, worst: float
) -> None:
    model = loaded(llama, dtype=torch.float32, **flags).model
    dense = loaded(llama, dtype=torch.float32, load_in_4bit=False).model
    layer, original = getattr(model.model.layers[1].mlp, name), getattr(dense.model.layers[1].mlp, name)
    assert format_of(layer).name == storage
    assert format_of(model.lm_head).name == "dense"
    error = (dequantize(layer).float() - original.weight).norm() / original.weight.norm()
    assert 0 < error < worst
    if storage == "nf4":
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes' CPU code only")
def test_layers_that_bitsandbytes_misreads_on_a_cpu_stay_dense(tmp_path: Path) -> None:
    llama = save_tiny(tmp_path / "odd", "llama", intermediate_size=96)
    result = loaded(llama, dtype=torch.float32)
    dense = loaded(llama, dtype=torch.float32, load_in_4bit=False)
    odd = [n for n, m in dense.model.named_modules() if isinstance(m, torch.nn.Linear) and m.in_features % 64]
    assert odd
    for name in odd:
        layer = result.model.get_submodule(name)
        assert torch.equal(layer.weight, dense.model.get_submodule(name).weight)
    assert f"{len(odd)} layers stay dense (down_proj)" in notes(result)
    assert logits(result.model, result.tokenizer).isfinite().all()


def test_default_dtype_is_the_devices(llama: Path) -> None:
    assert loaded(llama).model.dtype == default_dtype(fp16_safe=True)
    assert loaded(llama, load_in_16bit=True).model.dtype in (torch.bfloat16, torch.float16)


def test_base_weights_do_not_train_unless_all_do(llama: Path) -> None:
    assert not any(p.requires_grad for p in loaded(llama).model.parameters())
    assert not any(p.requires_grad for p in loaded(llama, load_in_4bit=False).model.parameters())
    full = loaded(llama, full_finetuning=True)
    assert all(p.requires_grad for p in full.model.parameters())
    assert format_of(full.model.model.layers[0].mlp.up_proj).name == "dense"


@pytest.mark.parametrize(("wish", "dtype"), [(True, torch.float32), (False, torch.bfloat16), (None, torch.bfloat16)])
def test_float32_mixed_precision_of_full_finetuning(llama: Path, wish: bool | None, dtype: torch.dtype) -> None:
    result = loaded(llama, full_finetuning=True, dtype=torch.bfloat16, float32_mixed_precision=wish)
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_a_checkpoint_stored_in_nf4_loads_as_it_is(llama: Path, tmp_path: Path) -> None:
    first = loaded(llama, dtype=torch.bfloat16)
    first.model.save_pretrained(tmp_path / "nf4")
    first.tokenizer.save_pretrained(tmp_path / "nf4")
    again = loaded(tmp_path / "nf4", dtype=torch.bfloat16)
    layer = again.model.model.layers[0].mlp.up_proj
    assert format_of(layer).name == "nf4"
    assert torch.equal(layer.weight.data, first.model.model.layers[0].mlp.up_proj.weight.data)
    assert torch.equal(logits(again.model, again.tokenizer), logits(first.model, first.tokenizer))


def test_attn_implementation_is_honoured(llama: Path) -> None:
    assert loaded(llama, attn_implementation="eager").model.config._attn_implementation == "eager"
    assert loaded(llama, attn_implementation="sdpa").model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "place", ["sequential", "auto", "balanced", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}]
)
def test_device_maps(llama: Path, place: Any) -> None:
    model = loaded(llama, load_in_4bit=False, device_map=place).model
    chosen_here = isinstance(place, str) and place in PLACEMENTS
    assert {p.device.type for p in model.parameters()} == {DEVICE if chosen_here else "cpu"}


def test_a_device_map_with_disk(llama: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    result = loaded(
        llama,
        load_in_4bit=False,
        dtype=torch.float32,
        device_map={**places, "lm_head": "cpu"},
        offload_folder=str(tmp_path / "offload"),
    )
    assert result.model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    whole = loaded(llama, load_in_4bit=False, dtype=torch.float32, device_map="cpu")
    assert torch.equal(logits(result.model, result.tokenizer), logits(whole.model, whole.tokenizer))


def test_config_fields_and_own_config_pass(llama: Path) -> None:
    assert loaded(llama, use_cache=False).model.config.use_cache is False
    config = AutoModelForCausalLM.from_pretrained(llama).config
    config.rms_norm_eps = 0.5
    model = loaded(llama, config=config, max_seq_length=256).model
    assert model.config.rms_norm_eps == 0.5
    assert config.rope_parameters["rope_type"] == "default"


def test_name_and_source_are_what_was_asked(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    result = load(LoadOptions(model_name=llama.name, max_seq_length=64))
    assert result.source.name == str(llama.resolve())
    assert result.model.name_or_path == result.model.config.name_or_path == str(llama.resolve())
    assert f"weights: {llama.resolve()}" in notes(result)


def test_settings_of_an_engine_that_is_off_are_reported(llama: Path) -> None:
    result = loaded(llama, gpu_memory_utilization=0.7, max_lora_rank=32)
    assert "gpu_memory_utilization, max_lora_rank: settings of the vLLM engine, which is off" in notes(result)
    assert "vLLM" not in notes(loaded(llama))


def test_offload_embedding_on_a_cpu_is_there_already(llama: Path) -> None:
    assert "in CPU memory already" in notes(loaded(llama, offload_embedding=True, device_map="cpu"))


def test_loading_leaves_the_callers_generators_alone(llama: Path) -> None:
    before = (torch.random.get_rng_state(), random.getstate())
    loaded(llama, resize_model_vocab=512)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_local_folder_is_loaded_without_the_network(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        attempts.append(address)
        raise OSError("blocked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: attempts.append(a))
    loaded(llama, token="secret")
    assert attempts == []


def test_an_adapter_folder_gives_its_base_and_itself(llama: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    result = loaded(tmp_path / "adapter")
    assert result.adapter == (tmp_path / "adapter").resolve()
    assert result.source.name == str(llama)
    assert "adapter: " in notes(result)
    assert not hasattr(result.model, "peft_config")


def test_an_adapters_base_may_lie_beside_it_and_its_tokenizer_wins(llama: Path, copy_of: Any, tmp_path: Path) -> None:
    copy_of(llama)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../copy"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(adapter)
    result = loaded(adapter)
    assert result.source.folder == (tmp_path / "copy").resolve()
    assert "<tool>" in result.tokenizer.get_vocab()
