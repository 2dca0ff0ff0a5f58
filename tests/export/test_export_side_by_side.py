"""Weights that lie behind each other in one buffer (as on a GPU) are saved, copied and moved as any others."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hasten.export import save_merged
from hasten.overlays import Overlay
from hasten.patching import apply
from hasten.testing import tiny_model, tiny_tokenizer
from hasten.weights import pack_weights


def laid_out(tied: bool = False) -> Any:
    model = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=tied)
    apply(model)
    for module in model.modules():
        if isinstance(module, Overlay) and module.packed_projections:
            assert pack_weights([module.get_submodule(name) for name in module.packed_projections])
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.k_proj.weight.untyped_storage().data_ptr()
    return model


def same(left: Any, right: Any) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_and_merged(tied: bool, tmp_path: Path) -> None:
    model = laid_out(tied)
    model.save_pretrained(tmp_path / "stock")
    save_merged(model, tmp_path / "merged", tiny_tokenizer(), "merged_16bit")
    for folder, dtype in (("stock", torch.float32), ("merged", torch.float32)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=dtype)
        for name, weight in loaded.state_dict().items():
            mine = model.state_dict()[name]
            torch.testing.assert_close(
                weight, mine, rtol=0 if folder == "stock" else 1e-2, atol=1e-2 * (folder != "stock")
            )
    sizes = [sum(f.stat().st_size for f in (tmp_path / "stock").glob("*.safetensors"))]
    assert sizes[0] < 1.2 * sum(p.numel() * 4 for p in model.parameters())


def test_a_copy_and_a_moved_model_keep_their_values(tmp_path: Path) -> None:
    model = laid_out()
    assert same(copy.deepcopy(model), model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wide = model.to(torch.float64)
    assert all(torch.equal(weight.float(), before[name]) for name, weight in wide.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    back = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(back[name].float(), before[name]) for name in before)


def test_training_moves_each_weight_alone() -> None:
    """An optimizer's step on one projection leaves its neighbours in the buffer as they are."""
    model = laid_out()
    attention = model.model.layers[0].self_attn
    before = [p.weight.clone() for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    optimizer = torch.optim.SGD([attention.k_proj.weight], lr=1.0)
    model.train()
    ids = torch.arange(6, 18)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert (
        torch.equal(before[0], after[0]) and torch.equal(before[2], after[2]) and not torch.equal(before[1], after[1])
    )
