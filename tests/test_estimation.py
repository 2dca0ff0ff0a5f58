"""The estimate's parts against counts taken from real (tiny) models, how they answer to each argument, and the savings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hasten.errors import CheckpointError, OptionError
from hasten.estimation import Estimate, estimate
from hasten.testing.tiny import save_tiny, tiny_config, tiny_model
from hasten.training.memory.actions import ActivationAction
from hasten.training.memory.advice import StepConfig, advice, savings
from hasten.training.memory.costs import ModelShape, peak, with_tile
from hasten.units import format_bytes, parse_bytes

LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32000}
"""A config whose savings give more than a MiB each; of it nothing is allocated."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere"])
def test_dense_weights_are_the_models_own_bytes(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    assert estimate(tiny_config(family), quantization=None, full_finetuning=True).peak.weights == real


def test_nf4_weights_are_what_bitsandbytes_stores() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    real = 0
    for module in linears:
        packed, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
        real += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    four, dense = (estimate(model.config, quantization=q).peak.weights for q in ("4bit", None))
    assert four - (dense - 2 * sum(m.weight.numel() for m in linears)) == pytest.approx(real, rel=1e-3)


def test_gradients_and_moments_are_those_of_the_adapters_own_parameters() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=8, target_modules="all-linear"))
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = estimate(tiny_config("llama"), rank=8)
    assert found.peak.optimizer == adapter * 8
    eight = estimate(tiny_config("llama"), rank=8, optimizer="adamw_8bit").peak.optimizer
    assert 2 * adapter < eight < 2.05 * adapter
    assert estimate(tiny_config("llama"), rank=8, optimizer="paged").peak.optimizer == 0


def test_each_part_answers_to_its_argument() -> None:
    config = tiny_config("llama", **LARGE)
    base = estimate(config, seq_len=512)
    longer = estimate(config, seq_len=1024)
    assert longer.peak.layers == 2 * base.peak.layers and longer.peak.weights == base.peak.weights
    kept = estimate(config, seq_len=512, checkpointing=False)
    offload = estimate(config, seq_len=512, checkpointing="offload")
    assert offload.total < base.total < kept.total
    assert offload.peak.host == 8 * 512 * 512 * 2 and not base.peak.host
    tiled = estimate(config, seq_len=8192, checkpointing=False, tiled_mlp=256)
    assert tiled.total < estimate(config, seq_len=8192, checkpointing=False).total and "256 tokens" in tiled.plan
    four, eight, dense = (estimate(config, quantization=q).peak.weights for q in ("4bit", "8bit", None))
    assert four < eight < dense
    untied = estimate(config).peak.weights - estimate(config, offload_embedding=True).peak.weights
    assert untied == 32000 * 512 * 2


def test_the_parts_are_the_total_and_the_text_has_them_and_the_plan() -> None:
    found: Estimate = estimate(tiny_config("llama"), checkpointing="unsloth", memory_budget="1GiB")
    assert found.total == sum(found.parts().values()) and found.fits
    assert all(f"{label}: {format_bytes(size)}" in str(found) for label, size in found.parts().items())
    assert "4 of 4 layers save all activations" in found.plan and found.plan in str(found)


def test_auto_spends_the_budget_and_no_more() -> None:
    config = tiny_config("llama", **LARGE)
    rows: dict[str, Any] = {"seq_len": 4096, "batch_size": 4}
    low = estimate(config, checkpointing="offload", tiled_mlp=1024, **rows).total
    high = estimate(config, checkpointing=False, **rows).total
    before = None
    for share in (0.1, 0.4, 0.7, 1.0):
        budget = int(low + share * (high - low))
        found = estimate(config, checkpointing="auto", memory_budget=budget, **rows)
        assert found.fits and found.total <= budget
        assert before is None or found.total >= before.total
        before = found
    assert before is not None and before.total == high
    paged = estimate(config, checkpointing="auto", memory_budget=high, optimizer="paged", **rows)
    assert paged.fits and paged.total < high
    tight = estimate(config, checkpointing="auto", memory_budget="1MB", **rows)
    assert not tight.fits and tight.total <= low * 1.01


def test_a_folder_is_read_by_its_config_alone(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert estimate(folder, seq_len=64) == estimate(tiny_config("llama"), seq_len=64)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    bad: dict[str, Any] = {
        "batch_size": 0, "rank": -1, "quantization": "4bit", "full_finetuning": True, "optimizer": "sgd",
        "checkpointing": "sometimes", "tiled_mlp": "yes", "memory_budget": "much",
    }  # fmt: skip
    with pytest.raises(OptionError) as caught:
        estimate(tiny_config("llama"), **bad)
    assert len(caught.value.problems) == 7
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="memory_budget"):
            estimate(tiny_config("llama"), checkpointing="auto")
    with pytest.raises(CheckpointError, match="no config"):
        estimate(tmp_path)


def test_amounts() -> None:
    assert parse_bytes("24GiB") == parse_bytes(" 24 gib") == parse_bytes(24 * 2**30) == 24 * 2**30
    assert parse_bytes("1.5GB") == 1_500_000_000 and parse_bytes("12") == 12
    for wrong in ("", "GiB", "-1GB", "1 furlong", 0, "0.2"):
        with pytest.raises(ValueError, match="must be a size"):
            parse_bytes(wrong)


def shape_of(**changes: Any) -> ModelShape:
    return ModelShape.of_config(tiny_config("llama", **LARGE), **{"rank": 32, "quantization": None, **changes})


def test_every_lever_gives_what_the_changed_run_takes_less() -> None:
    now = StepConfig(8, 2048, (ActivationAction.SAVE_ALL,) * 8)
    total = now.peak(shape_of())
    found = savings(shape_of(), now)
    gains = {one.text.split("=")[0]: one.gain for one in found if "True" not in one.text.split("=")[1]}
    gains |= {one.text: one.gain for one in found}
    changed = {
        "load_in_4bit=True": now.peak(shape_of(quantization="4bit")),
        "offload_embedding=True": now.peak(shape_of(offload_embedding=True)),
        "r=16": now.peak(shape_of(rank=16)),
        "max_seq_length=1024": replace(now, length=1024).peak(shape_of()),
        "use_gradient_checkpointing=True": peak(shape_of(), 8, 2048, ActivationAction.RECOMPUTE).total,
        'use_gradient_checkpointing="offload"': peak(shape_of(), 8, 2048, ActivationAction.OFFLOAD).total,
        "unsloth_tiled_mlp=True": peak(shape_of(), 8, 2048, with_tile(now.actions, 4096), 4096).total,
        'optim="adamw_8bit"': peak(shape_of(), 8, 2048, ActivationAction.SAVE_ALL, optimizer="adamw_8bit").total,
    }
    for text, less in changed.items():
        assert gains[text] == pytest.approx(total - less, rel=1e-3), text
    assert "per_device_train_batch_size" in gains
    assert [one.gain for one in found] == sorted((one.gain for one in found), reverse=True)
    text = advice(found)
    assert all(f"{one.text}: {format_bytes(one.gain)} less" in text for one in found)


def test_levers_that_are_pulled_or_cannot_be_are_not_offered() -> None:
    lean = StepConfig(1, 256, (ActivationAction.OFFLOAD,) * 8, 1024, "paged")
    offered = " ".join(one.text for one in savings(shape_of(quantization="4bit", offload_embedding=True), lean))
    for pulled in ("4bit", "offload", "tiled", "optim", "batch"):
        assert pulled not in offered
    full = savings(shape_of(full_finetuning=True), StepConfig(8, 2048, (ActivationAction.SAVE_ALL,) * 8))
    assert not any("4bit" in one.text or one.text.startswith("r=") for one in full)
    assert "smaller model" in advice([])


def test_tiles_that_a_plan_may_choose_force_nothing() -> None:
    settings: Any = {"seq_len": 8192, "checkpointing": "auto", "memory_budget": "60GiB"}
    free, chosen, forced = (estimate(tiny_config("llama"), **settings, tiled_mlp=t) for t in (False, "auto", True))
    assert chosen.plan == free.plan and "save all activations" in free.plan
    assert "save all activations" not in forced.plan and "4096 tokens" in forced.plan
