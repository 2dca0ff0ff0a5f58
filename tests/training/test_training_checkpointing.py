"""Recomputing layers changes memory, never the loss or a gradient; and training mode comes back after inference."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import FAMILIES, apart, both, curve, gradients_apart, gradients_of, lora, rows, sft, small
from transformers.modeling_layers import GradientCheckpointingLayer

import hasten
from hasten.errors import OptionError
from hasten.state import causal_lm_of
from hasten.training import checkpointing, for_training


def checkpointed(model: Any) -> list[bool]:
    layers = [m for m in causal_lm_of(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    return [layer.gradient_checkpointing for layer in layers]


def step(model: Any, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how often the first layer ran, recomputation included."""
    calls = []
    first = causal_lm_of(model).model.layers[0]
    hook = first.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    data = rows(1, longest=20, seed=5)[0]
    torch.manual_seed(11)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**{key: torch.tensor([value]) for key, value in data.items()}).loss
    loss.backward()
    hook.remove()
    return loss.detach()[None], gradients_of(model), len(calls)


@pytest.mark.grid(2)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_with_and_without(family: str, dropout: float, autocast: bool) -> None:
    found = {}
    for mode in (False, True, "offload", "unsloth", "auto"):
        model = small(family, True, lora(lora_dropout=dropout))
        checkpointing.enable(model, mode)
        assert set(checkpointed(model)) == {bool(mode)}
        found[mode] = step(model, autocast)
    loss, gradients, runs = found[False]
    assert runs == 1
    for mode, runs in ((True, 2), ("offload", 2), ("unsloth", 1), ("auto", 1)):
        assert torch.equal(found[mode][0], loss)
        assert gradients_apart(found[mode][1], gradients) == 0
        assert found[mode][2] == runs, "a tiny model has room to keep all, and only then"


def test_full_finetuning_and_trained_embeddings_too() -> None:
    for adapter in (None, lora(modules_to_save=["embed_tokens"])):
        plain, recomputed = (small("llama", True, adapter, tie_word_embeddings=False) for _ in range(2))
        checkpointing.enable(recomputed, True)
        (loss, gradients, _), (loss_again, again, _) = step(plain, False), step(recomputed, False)
        assert torch.equal(loss, loss_again) and gradients_apart(again, gradients) < 1e-6


def test_no_warning_and_no_pile_of_hooks() -> None:
    model = small("llama", True, lora())
    embedding = causal_lm_of(model).get_input_embeddings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (True, True, False, "auto", "unsloth"):
            checkpointing.enable(model, mode)
            assert not embedding._forward_hooks


def test_notes_say_what_happens() -> None:
    model = small("llama", True)
    assert "off" in checkpointing.enable(model, False)[0]
    assert "recomputed" in checkpointing.enable(model, True)[0]
    assert "CPU memory" in checkpointing.enable(model, "offload")[0]
    for mode in ("unsloth", "auto"):
        assert mode in checkpointing.enable(model, mode)[0] and "free" in checkpointing.enable(model, mode)[0]
    assert "2.0 GiB" in checkpointing.enable(model, "auto", 2 * 2**30)[0]
    assert "planned at the first step" in str(hasten.report(model))
    step(model, False)
    assert "2 of 2 layers save all activations" in str(hasten.report(model))


@pytest.mark.parametrize("mode", ["Offload", "Unsloth", 1, None, 0])
def test_other_modes_raise_and_change_nothing(mode: Any) -> None:
    model = small("llama", True)
    checkpointing.enable(model, True)
    with pytest.raises(OptionError, match="use_gradient_checkpointing"):
        checkpointing.enable(model, mode)
    assert set(checkpointed(model)) == {True}


def test_a_trainer_that_switches_it_as_well_trains_the_same(tmp_path: Path) -> None:
    data = rows(8, seed=2)
    for mode in (False, True):
        stock, ours = both(
            lambda hasten, mode=mode: curve(
                sft(prepared(hasten, mode), data, tmp_path, max_steps=4, gradient_checkpointing=True)
            )
        )
        assert apart(ours, stock) < 1e-5


def prepared(hasten: bool, mode: bool) -> Any:
    model = small("llama", hasten, lora())
    if hasten:
        checkpointing.enable(model, mode)
    return model


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("adapter", [lora(modules_to_save=["lm_head"]), None], ids=["LoRA", "full"])
def test_training_mode_comes_back(adapter: Any, mode: bool) -> None:
    from hasten.inference import for_inference

    model = small("llama", True, adapter, tie_word_embeddings=False)
    checkpointing.enable(model, mode)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert for_training(model) is model
    before = state(model)
    assert before[0] == {True} and before[1] == {mode} and before[2] is False
    for _ in range(2):
        for_inference(model)
        inference = state(model)
        assert inference[0] == {False} and inference[2] is True
        for_training(model)
        assert state(model) == before
        for_inference(model)
        assert state(model) == inference
        for_training(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def state(model: Any) -> tuple[set[bool], set[bool], bool]:
    return {m.training for m in model.modules()}, set(checkpointed(model)), causal_lm_of(model).config.use_cache
