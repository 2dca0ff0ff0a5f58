"""Generation as a user does it: loaded by FastLanguageModel, quantised or not, with an adapter, prompts by a tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten import FastLanguageModel, InputError
from hasten.testing import save_tiny

PROMPTS = ["one", "a longer prompt than that", "two words", "the longest of all of these prompts by far"]
EXACT = {"dtype": torch.float32, "max_seq_length": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "qwen2", tie_word_embeddings=False)


def loaded(folder: Path, adapter: bool = False, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **{**EXACT, **options})
    if adapter:
        model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    return model, tokenizer


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_batched_equals_alone(folder: Path, quantised: bool, adapter: bool) -> None:
    model, tokenizer = loaded(folder, adapter, load_in_4bit=quantised)
    FastLanguageModel.for_inference(model)
    alone = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        alone.append(model.generate(input_ids=ids, max_new_tokens=16, do_sample=False, eos_token_id=None)[0, -16:])
    for side in ("left", "right"):
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side).to(model.device)
        got = model.generate(**batch, max_new_tokens=16, do_sample=False, eos_token_id=None)[:, -16:]
        assert torch.equal(got, torch.stack(alone)), side


def test_generating_does_not_change_4bit_weights(folder: Path) -> None:
    """Neither the codes nor their scales, so that training and merging go on from what was loaded."""
    model, tokenizer = loaded(folder, load_in_4bit=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("weight.nested_absmax") for name in before)
    inputs = tokenizer("abc", return_tensors="pt").to(model.device)
    FastLanguageModel.for_inference(model).generate(**inputs, max_new_tokens=4)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_the_model_was_loaded_for_is_its_limit(folder: Path) -> None:
    model, tokenizer = loaded(folder, load_in_4bit=False, max_seq_length=32)
    batch = tokenizer(PROMPTS[0], return_tensors="pt").to(model.device)
    with pytest.raises(InputError, match="max_seq_length=32"):
        model.generate(**batch, max_new_tokens=32)
    assert model.generate(**batch, max_new_tokens=28, eos_token_id=None).shape[1] == 32


def test_beyond_the_checkpoints_context_equals_stock_with_the_same_rope(folder: Path) -> None:
    """max_seq_length extends the rope of a checkpoint of 128 positions; generation crosses them."""
    model, tokenizer = loaded(folder, load_in_4bit=False, max_seq_length=256)
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, config=model.config, dtype=torch.float32).to(model.device)
    batch = tokenizer("x" * 120, return_tensors="pt").to(model.device)
    how = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **how), stock.generate(**batch, **how))
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device)
    with torch.no_grad():
        logits = [m(**batch).logits for m in (model, stock, plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3 if model.device.type == "cuda" else 0)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2), "the rope must matter"


def test_tokenizer_and_configs_stay_as_they_were(folder: Path) -> None:
    model, tokenizer = loaded(folder, load_in_4bit=False)
    configs = (model.config.to_dict(), model.generation_config.to_dict())
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(model.device)
    state = (tokenizer.padding_side, tokenizer.init_kwargs.copy(), tokenizer.backend_tokenizer.to_str())
    model.generate(**batch, max_new_tokens=4)
    assert state == (tokenizer.padding_side, tokenizer.init_kwargs, tokenizer.backend_tokenizer.to_str())
    assert configs == (model.config.to_dict(), model.generation_config.to_dict())


def test_switching_modes_as_methods_and_functions(folder: Path) -> None:
    model, tokenizer = loaded(folder, adapter=True, load_in_4bit=True)
    FastLanguageModel.for_training(model)
    assert model.training and model.is_gradient_checkpointing
    assert model.for_inference() is model
    assert not model.training and not model.is_gradient_checkpointing
    assert model.for_training() is model
    assert model.training and model.is_gradient_checkpointing
    batch = tokenizer(PROMPTS[1], return_tensors="pt").to(model.device)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
