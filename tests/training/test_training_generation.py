"""GRPO through TRL on the decode engine: it samples from the adapter that trains, and training is as with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import both, causal_lm_of, curve, grpo, lora, preferences, small

from hasten.inference.decode import DecodeEngine
from hasten.state import state_of
from hasten.training import checkpointing


def varied(completions: list[str], **kwargs: Any) -> list[float]:
    return [max((text.count(c) for c in set(text)), default=0) / 8 + len(set(text)) / 3 for text in completions]


def run(folder: Path, hasten: bool, mode: Any = False, adapter: Any = None, **changes: Any) -> dict[str, Any]:
    """Trains; returns what was sampled, logged and learnt, and the engine's notes."""
    seen: list[str] = []
    notes: set[str] = set()
    model = small("llama", hasten, adapter)

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        if hasten:
            notes.update(state_of(causal_lm_of(trainer.model)).notes["generation"])
        return varied(completions)

    if hasten:
        state_of(model).engine = DecodeEngine(("cpu",))
        checkpointing.enable(model, mode)
    settings = {
        "max_steps": 4,
        "beta": 0.04 if adapter else 0.0,
        "learning_rate": 2e-2,
        "gradient_checkpointing": bool(mode),
        **changes,
    }
    trainer: Any = grpo(model, preferences(8).select_columns("prompt"), folder, reward, **settings)
    losses = curve(trainer)
    base = causal_lm_of(trainer.model)
    assert base.training and all(module.training for module in trainer.model.modules())
    if hasten:
        engine: Any = state_of(base).engine
        assert engine.captured == (notes == {"engine: hasten"}) and all(
            not cache.view(0).blocks for cache, _ in engine._steps._kept.values()
        )
    learnt = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"seen": seen, "losses": losses, "learnt": learnt, "notes": notes, "rng": torch.get_rng_state()}


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("adapter", [lora, lambda: None], ids=["LoRA", "full"])
def test_grpo_is_as_with_transformers(adapter: Callable[[], Any], mode: bool, tmp_path: Path) -> None:
    stock, ours = both(lambda hasten: run(tmp_path, hasten, mode, adapter()))
    assert ours["notes"] == {"engine: hasten"}
    assert ours["seen"] == stock["seen"] and len(ours["seen"]) == 16
    assert torch.equal(ours["rng"], stock["rng"])
    torch.testing.assert_close(ours["losses"], stock["losses"], rtol=1e-3, atol=1e-5)
    assert ours["learnt"].keys() == stock["learnt"].keys()
    for name, value in stock["learnt"].items():
        torch.testing.assert_close(ours["learnt"][name], value, rtol=1e-2, atol=2e-3)


def test_samples_follow_the_adapter_that_trains(tmp_path: Path) -> None:
    """The same run without learning samples the same in its first step only."""
    samples = []
    for rate in (2e-2, 0.0):
        torch.manual_seed(0)
        samples.append(run(tmp_path, True, adapter=lora(), learning_rate=rate)["seen"])
    learning, frozen = samples
    assert learning[:4] == frozen[:4] and learning[4:] != frozen[4:]


def test_the_engine_does_not_change_a_step(tmp_path: Path) -> None:
    """The same samples, drawn by transformers' own loop over the same overlays: bit-equal losses and weights."""
    results = []
    for engine in ("hasten", "transformers"):
        torch.manual_seed(0)
        kwargs = {"generation_kwargs": {"prefill_chunk_size": 64}} if engine == "transformers" else {}
        results.append(run(tmp_path, True, True, lora(), **kwargs))
    ours, stock = results
    assert ours["notes"] == {"engine: hasten"} and all("prefill_chunk_size" in note for note in stock["notes"])
    assert ours["seen"] == stock["seen"] and torch.equal(ours["losses"], stock["losses"])
    assert all(torch.equal(value, stock["learnt"][name]) for name, value in ours["learnt"].items())


def test_mixed_precision_is_served(tmp_path: Path) -> None:
    """accelerate wraps the forward of a model that trains fully; that wrapper only casts."""
    found = run(tmp_path, True, bf16=True)
    assert found["notes"] == {"engine: hasten"} and torch.isfinite(found["losses"]).all()
