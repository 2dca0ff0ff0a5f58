"""Tied embeddings: one tensor on disk while head and embedding are one, two and a truthful config once they are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from export_kit import adapt, base_folder, close, config, fresh_logits, load, logits, tensors

from hasten.export import save_merged

# PEFT's advice to tie an adapter's copies; here they are untied on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning"
)
TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    # family, changes to its config, adapter, still tied afterwards
    "frozen": ("gemma2", {}, {"target_modules": ["q_proj"]}, True),
    "frozen llama": ("llama", TIED, {"target_modules": ["q_proj"]}, True),
    "lora on embedding": ("llama", TIED, {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "lora on head": ("cohere", {}, {"target_modules": ["q_proj", "lm_head"]}, False),
    "lora on both, tied": ("gemma2", {}, {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True),
    "lora on both, apart": ("gemma2", {}, {"target_modules": ["embed_tokens", "lm_head"]}, False),
    "embedding trained": ("llama", TIED, {"modules_to_save": ["embed_tokens"]}, False),
    "head trained": ("gemma", {}, {"modules_to_save": ["lm_head"]}, False),
    "both trained, tied": ("gemma2", {}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "both trained, apart": ("qwen2", TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "rows trained": ("gemma2", {}, {"trainable_token_indices": [4, 8, 270]}, True),
}  # fmt: skip


def _save(folder: Path, case: str, quantised: bool = False) -> tuple[Any, Path]:
    model_type, changes, adapter, _ = CASES[case]
    base = base_folder(folder / "base", model_type, **changes)
    model = adapt(load(base), **adapter)
    save_merged(model, folder / "out", max_shard_size="90KB")
    return model, folder / "out"


@pytest.mark.parametrize("case", CASES)
def test_disk_tells_the_truth(tmp_path: Path, case: str) -> None:
    model, out = _save(tmp_path, case)
    still_tied = CASES[case][3]
    found = tensors(out)
    assert config(out)["tie_word_embeddings"] is still_tied
    assert ("lm_head.weight" in found) is not still_tied
    again = load(out)
    shared = again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()
    assert shared is still_tied
    close(logits(again), logits(model))


def test_all_of_them_in_a_fresh_process(tmp_path: Path) -> None:
    saved = [_save(tmp_path / str(number), case) for number, case in enumerate(CASES)]
    for got, (model, _) in zip(fresh_logits([out for _, out in saved], tmp_path), saved, strict=True):
        close(got, logits(model))


def test_head_that_the_base_stores_although_it_is_tied(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = base_folder(tmp_path / "base", "gemma2", max_shard_size="5GB")
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    model = adapt(load(base), target_modules=["q_proj"])
    save_merged(model, tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    close(logits(load(tmp_path / "out")), logits(model))


def test_untied_head_starts_from_the_16_bit_embedding(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "gemma2", dtype=torch.bfloat16)
    model = adapt(load(base, dtype=torch.float32), target_modules=["lm_head"])
    save_merged(model, tmp_path / "out")
    new, old = tensors(tmp_path / "out"), tensors(base)["model.embed_tokens.weight"]
    delta = model.base_model.model.lm_head.get_delta_weight("default")
    assert torch.equal(new["model.embed_tokens.weight"], old)
    torch.testing.assert_close(new["lm_head.weight"], (old.float() + delta).bfloat16())
