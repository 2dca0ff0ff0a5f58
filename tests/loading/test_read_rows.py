"""Quantising row by row, which hasten does on a CPU, gives, to the bit, the model that transformers' loader gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers_kit import exact_attention

from hasten.families import FAMILIES
from hasten.loading import load
from hasten.options import LoadOptions
from hasten.testing import save_tiny, tiny_model
from hasten.weights.formats import format_of
from hasten.weights.formats.base import CHUNK

pytest.importorskip("bitsandbytes")
SETTINGS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
OWN_FIELDS = {"_commit_hash", "_name_or_path"}
# How tensors were renamed while reading (none were) and whether hub kernels are on (the default, off).
LEFT_OUT = {"_weight_conversions", "_use_kernels"}


INNER = 17 * 64
assert CHUNK < INNER * 64 < 2 * CHUNK


def both(folder: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """(read by hasten, read by transformers)."""
    stock: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**SETTINGS[storage]),
        device_map={"": "cpu"},
        **exact_attention(folder),
    )
    asked = {"load_in_8bit": True} if storage == "int8" else {}
    options = LoadOptions.from_call(
        model_name=str(folder), max_seq_length=64, dtype=torch.bfloat16, fix_tokenizer=False, device_map="cpu", **asked
    )
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read by transformers"))
        return load(options).model, stock


def values(model: Any) -> dict[str, Any]:
    return {**model.state_dict(), **{f"buffer {n}": b for n, b in model.named_buffers()}}


@pytest.mark.parametrize("storage", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_equal_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, storage: str) -> None:
    folder = tmp_path / "base"
    # The matrices of the MLP are read in two chunks, the last one short.
    save_tiny(folder, model_type, max_shard_size="60KB", dtype=torch.bfloat16, intermediate_size=INNER, head_dim=32)
    ours, theirs = both(folder, storage, monkeypatch)
    expected, found = values(theirs), values(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert set(vars(theirs)) - set(vars(ours)) <= LEFT_OUT
    kept = [{k: v for k, v in m.config.to_dict().items() if k not in OWN_FIELDS} for m in (ours, theirs)]
    for field in kept:
        field["quantization_config"].pop("llm_int8_skip_modules", None)
    assert kept[0] == kept[1]
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    for module in theirs.modules():
        # bitsandbytes would round the scales of the stock model to bf16 in its first forward; loading keeps ours as read.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_an_fp32_checkpoint_is_quantised_from_fp32(llama: Path) -> None:
    options = LoadOptions(model_name=str(llama), max_seq_length=64, dtype=torch.bfloat16, device_map="cpu")
    model = load(options).model
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    import bitsandbytes.functional as bnb

    dense = tiny_model("llama").get_submodule("model.layers.0.mlp.up_proj").weight.data
    codes, state = bnb.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
    assert model.get_submodule("model.norm").weight.dtype == torch.bfloat16


def test_a_bf16_checkpoint_of_an_fp32_model_is_dequantised_to_fp32(tmp_path: Path) -> None:
    """bitsandbytes rounds to the dtype that it quantised from, which is the model's in transformers."""
    save_tiny(tmp_path, "llama", dtype=torch.bfloat16)
    settings = BitsAndBytesConfig(**{**SETTINGS["nf4"], "bnb_4bit_compute_dtype": torch.float32})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=settings)
    ours = load(LoadOptions(model_name=str(tmp_path), max_seq_length=64, dtype=torch.float32)).model
    seen = []
    for model in (ours, stock):
        layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
        assert layer.weight.quant_state.dtype == torch.float32
        x = torch.linspace(-1, 1, 64, device=layer.weight.device).requires_grad_()
        layer(x[None, None]).sum().backward()
        seen.append(x.grad)
    assert torch.equal(*seen)


def test_what_it_leaves_to_transformers(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, inner = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **how: read.append(args) or inner(*args, **how)
    )
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    options = LoadOptions.from_call(model_name=str(llama), max_seq_length=64, quantization_config=own)
    assert format_of(load(options).model.get_submodule("model.layers.0.mlp.up_proj")).name == "fp4" and len(read) == 1
