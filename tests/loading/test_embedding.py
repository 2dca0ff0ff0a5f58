"""An embedding on the host: rows, moves, hooks and files, as far as a CPU can tell (the GPU's part: test_embedding_gpu.py)."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from device_kit import DEVICE, ON_GPU
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers_kit import recompute

from hasten import FastLanguageModel
from hasten.errors import InputError, OptionError
from hasten.loading.embedding import HostEmbedding, _stay, keep_embedding_on_host
from hasten.ops.host_rows import host_rows
from hasten.testing import tiny_model

IDS = torch.tensor([[1, 5, 287, 0], [7, 7, 2, 44]])


def offloaded(name: str = "llama") -> tuple[Any, Any]:
    """(a model with its embedding kept on the host, as on a GPU but without one; the same untouched)."""
    changes = {"layer_types": ["sliding_attention", "full_attention"]} if name == "gemma3_text" else {}
    model = tiny_model(name, tie_word_embeddings=False, num_hidden_layers=2, **changes)
    model.requires_grad_(False)
    stock = copy.deepcopy(model)
    _stay(model, model.get_input_embeddings())
    return model, stock


def readable(table: torch.Tensor, ids: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(table, ids) where the backend reads them: a GPU reads pinned memory by ids of its own."""
    return (table.pin_memory(), ids.to(DEVICE)) if ON_GPU and backend == "triton" else (table, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_are_the_tables(backend: Any, dtype: torch.dtype) -> None:
    table, ids = readable(torch.randn(288, 1500).to(dtype), IDS, backend)
    rows = host_rows(table.requires_grad_(), ids.expand(3, 2, 4)[:, ::2], backend)
    assert torch.equal(rows.cpu(), table[IDS.expand(3, 2, 4)[:, ::2]]) and not rows.requires_grad
    assert host_rows(table, ids[:0], backend).shape == (0, 4, 1500)


def test_an_id_outside_of_the_table_shows() -> None:
    table, ids = readable(torch.ones(5, 8), torch.tensor([4, 5, -1]), "triton")
    rows = host_rows(table, ids, "triton")
    assert bool((rows[0] == 1).all()) and bool(rows[1:].isnan().all())
    with pytest.raises(IndexError):
        host_rows(table, torch.tensor([5]), "reference")
    with pytest.raises(ValueError, match="pinned"):
        host_rows(torch.ones(5, 16)[:, ::2], ids[:1], "triton")


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_logits_and_files_are_stocks(name: str, tmp_path: Path) -> None:
    """Gemma 3 scales its rows in a class of its own."""
    model, stock = offloaded(name)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding) and isinstance(embedding, type(stock.get_input_embeddings()))
    assert type(embedding).__name__ in ("HostEmbedding", type(stock.get_input_embeddings()).__name__)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, stock(IDS).logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=4), stock.generate(IDS, max_new_tokens=4))
    assert model.state_dict().keys() == stock.state_dict().keys()
    model.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in stock.state_dict().items())


def test_the_model_moves_and_the_embedding_stays() -> None:
    """ "meta" stands for another device: whatever follows lands there."""
    model, _ = offloaded("gemma3_text")
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    before = weight.detach().clone()
    model.to("meta")
    others = {
        t.device.type for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t is not weight
    }
    assert embedding.weight is weight and weight.device.type == "cpu" and torch.equal(weight, before)
    assert others == {"meta"} and embedding.embed_scale.device.type == "meta"
    assert model.device.type == "meta" and next(model.parameters()).device.type == "meta"


def test_a_change_of_dtype_is_followed() -> None:
    model, stock = offloaded()
    assert torch.equal(model.bfloat16()(IDS).logits, stock.bfloat16()(IDS).logits)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_lora_trains_with_recompute_as_beside_a_plain_embedding() -> None:
    gradients = []
    for model in offloaded():
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))
        model.enable_input_require_grads()  # transformers' hook on the embedding's output
        recompute(model, use_reentrant=True)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 4
    assert any(bool(g.any()) for g in gradients[0].values())
    assert all(torch.equal(gradients[0][name], g) for name, g in gradients[1].items())


def test_accelerates_hooks_call_the_new_forward() -> None:
    model = tiny_model("llama", tie_word_embeddings=False, num_hidden_layers=2)
    embedding: Any = model.get_input_embeddings()
    add_hook_to_module(embedding, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    _stay(model, embedding)
    embedding.weight.requires_grad_(True)
    with pytest.raises(InputError, match="this one trains"):
        model(IDS)
    with torch.no_grad():
        assert torch.equal(embedding(IDS), embedding.weight[IDS])


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stay_on_the_host_too(how: str, name: str) -> None:
    model, stock = offloaded(name)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
    assert type(twin.get_input_embeddings()) is type(model.get_input_embeddings())
    assert isinstance(twin.get_input_embeddings(), HostEmbedding)
    assert torch.equal(twin(IDS).logits, stock(IDS).logits)


def test_on_a_cpu_nothing_is_done() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    assert "already" in keep_embedding_on_host(model) and type(model.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize(
    "asked", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_a_trained_embedding_is_refused(llama: Path, asked: dict[str, Any]) -> None:
    """On a CPU too, where nothing would be in its way."""
    model, _ = FastLanguageModel.from_pretrained(
        str(llama), load_in_4bit=False, offload_embedding=True, max_seq_length=64
    )
    with pytest.raises(OptionError, match="offload_embedding"):
        FastLanguageModel.get_peft_model(model, **asked)
    assert not hasattr(model, "peft_config")
