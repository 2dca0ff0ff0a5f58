"""resize_model_vocab: new rows are the mean of the old, tied stays tied, config and saved checkpoint agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.loading import load
from hasten.loading.vocabulary import resize, seeded
from hasten.options import LoadOptions
from hasten.testing import tiny_model


@pytest.mark.parametrize("flags", [{"load_in_4bit": False}, {"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_rows_of_embedding_and_head(request: pytest.FixtureRequest, tmp_path: Path, name: str, flags: dict) -> None:
    folder: Path = request.getfixturevalue(name)
    options = LoadOptions.from_call(
        model_name=str(folder), max_seq_length=64, dtype=torch.float32, resize_model_vocab=320, **flags
    )
    model: Any = load(options).model
    old = AutoModelForCausalLM.from_pretrained(folder)
    for layer, before in ((model.model.embed_tokens, old.model.embed_tokens), (model.lm_head, old.lm_head)):
        rows = before.weight.to(layer.weight.device)
        assert torch.equal(layer.weight[:288], rows)
        expected = rows.mean(dim=0).expand(32, -1)
        assert torch.allclose(layer.weight[288:], expected, rtol=1e-5, atol=1e-7)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "gemma")
    assert model.config.vocab_size == 320
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = load(LoadOptions(model_name=str(folder), max_seq_length=64, dtype=torch.float32)).model
    assert again.config.vocab_size == 288
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.lm_head.weight.to(model.device), model.lm_head.weight)


def test_a_padded_vocabulary_never_shrinks_by_itself(tmp_path: Path, llama: Path) -> None:
    model = load(LoadOptions(model_name=str(llama), max_seq_length=64)).model
    assert model.config.vocab_size == 288  # the tokenizer needs fewer


def test_fewer_rows_if_asked() -> None:
    model = tiny_model("llama")
    before = model.lm_head.weight.clone()
    resize(model, 280, seed=0)
    assert torch.equal(model.lm_head.weight, before[:280])


def test_biases_of_a_head_grow_with_it() -> None:
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(64, 288, bias=True)
    before = model.lm_head.bias.clone()
    resize(model, 290, seed=0)
    assert torch.allclose(model.lm_head.bias[288:], before.mean().expand(2), atol=1e-7)


def test_seeded_gives_the_generator_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        first = torch.rand(2)
    with seeded(1):
        assert torch.equal(first, torch.rand(2))
    assert torch.equal(torch.rand(3), expected)
