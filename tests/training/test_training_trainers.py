"""Preference and reinforcement trainers, evaluation and early stopping: what they log is what they log for stock."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from training_kit import (
    FAMILIES,
    apart,
    both,
    causal_lm_of,
    chats,
    dpo,
    grpo,
    hf,
    logged,
    lora,
    preferences,
    rows,
    sft,
    small,
)
from transformers import EarlyStoppingCallback, EvalPrediction

TIMES = ("runtime", "per_second", "step_time", "mfu")


def history(trainer: Any) -> list[dict[str, float]]:
    """Everything that was logged, but for what a clock measured."""
    trainer.train()
    return [
        {key: value for key, value in entry.items() if not any(clock in key for clock in TIMES)}
        for entry in trainer.state.log_history
    ]


def assert_same_history(ours: list[dict[str, float]], stock: list[dict[str, float]], allowed: float) -> None:
    assert len(ours) == len(stock) > 1
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert math.isclose(mine[key], value, rel_tol=allowed, abs_tol=allowed), (key, mine[key], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_logs_what_stock_logs(family: str, tmp_path: Path) -> None:
    stock, ours = both(
        lambda hasten: history(dpo(small(family, hasten, lora()), preferences(16), tmp_path, max_steps=6))
    )
    assert_same_history(ours, stock, 1e-4)
    margins = [entry["rewards/margins"] for entry in ours if "rewards/margins" in entry]
    assert len(set(margins)) == len(margins) == 6, "the policy never moved away from its reference"


def share_of_a(completions: list[str], **kwargs: Any) -> list[float]:
    """Rewards that differ within a group: the share of the most frequent character."""
    return [max((text.count(c) for c in set(text)), default=0) / 8 + len(set(text)) / 3 for text in completions]


@pytest.mark.grid(1)
@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_grpo_generates_and_logs_what_stock_logs(family: str, temperature: float, tmp_path: Path) -> None:
    prompts = preferences(8).select_columns("prompt")
    seen: dict[bool, list[str]] = {False: [], True: []}

    def run(hasten: bool) -> list[dict[str, float]]:
        def reward(completions: list[str], **kwargs: Any) -> list[float]:
            seen[hasten] += completions
            return share_of_a(completions)

        model = small(family, hasten, lora())
        trainer = grpo(model, prompts, tmp_path, reward, max_steps=4, temperature=temperature, beta=0.04)
        found = history(trainer)
        assert causal_lm_of(trainer.model).training
        return found

    stock, ours = both(run)
    assert seen[True] == seen[False] and len(seen[True]) == 16
    assert_same_history(ours, stock, 1e-3)
    assert any(entry.get("reward_std", 0) > 0 for entry in ours)
    assert any(entry.get("grad_norm", 0) > 0 for entry in ours)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Needs the logits of every position: token accuracy and the mean of the best logit."""
    logits, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    kept = labels != -100
    return {
        "accuracy": float((logits.argmax(-1) == labels)[kept].mean()),
        "best": float(logits.max(-1)[kept].mean()),
        "rows": float(len(labels)),
    }


@pytest.mark.filterwarnings("ignore:`return_outputs=True`, and the logits:FutureWarning:trl.trainer.sft_trainer")
@pytest.mark.grid(1)
@pytest.mark.parametrize("make", [sft, hf], ids=["SFT", "Trainer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_with_compute_metrics_is_stocks(make: Any, family: str, tmp_path: Path) -> None:
    extra = {"eval_dataset": rows(6, seed=9), "compute_metrics": accuracy}
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    stock, ours = both(
        lambda hasten: history(make(small(family, hasten, lora()), rows(16), tmp_path, extra, **settings))
    )
    assert_same_history(ours, stock, 1e-4)
    evaluated = [entry for entry in ours if "eval_accuracy" in entry]
    assert len(evaluated) == 2 and evaluated[0]["eval_rows"] == 6
    assert evaluated[0]["eval_best"] != evaluated[1]["eval_best"]


def test_evaluation_of_chats_and_of_several_datasets(tmp_path: Path) -> None:
    extra = {"eval_dataset": {"chats": chats(4, seed=1), "rows": rows(4, seed=9)}}
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    stock, ours = both(
        lambda hasten: history(sft(small("llama", hasten, lora()), rows(8), tmp_path, extra, **settings))
    )
    assert_same_history(ours, stock, 1e-4)
    assert {"eval_chats_loss", "eval_rows_loss"} <= {key for entry in ours for key in entry}


def test_early_stopping_stops_where_stock_stops(tmp_path: Path) -> None:
    """A learning rate so high that evaluation soon gets worse; the best checkpoint comes back."""

    def run(hasten: bool) -> tuple[int, float, Any, list[dict[str, float]]]:
        folder = tmp_path / str(hasten)
        trainer = hf(
            small("llama", hasten, lora()),
            rows(8),
            folder,
            {"eval_dataset": rows(8, seed=9), "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
            max_steps=30,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )
        found = history(trainer)
        after = trainer.evaluate()["eval_loss"]
        assert math.isclose(after, trainer.state.best_metric, rel_tol=1e-5)
        return trainer.state.global_step, trainer.state.best_metric, trainer.state.best_global_step, found

    stock, ours = both(run)
    assert ours[0] == stock[0] < 30 and ours[2] == stock[2] < ours[0]
    assert math.isclose(ours[1], stock[1], rel_tol=1e-4)
    assert_same_history(ours[3], stock[3], 1e-3)


def test_bf16_training_follows_stock(tmp_path: Path) -> None:
    """autocast through the trainers: as near to fp32 training as stock is."""
    data = rows(32, seed=3)

    def run(hasten: bool, bf16: bool, make: Any) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = make(small("llama", hasten, lora()), data, tmp_path, max_steps=8, bf16=bf16)
        trainer.train()
        return logged(trainer, "loss")

    for make in (sft, hf):
        exact, stock, ours = run(False, False, make), run(False, True, make), run(True, True, make)
        assert 0 < apart(stock, exact) < 0.05
        assert apart(ours, exact) <= 2 * apart(stock, exact)


def test_a_batch_without_labels_among_others_counts_as_nothing(tmp_path: Path) -> None:
    """One micro-batch of an accumulated step has no label: a differentiable zero, not NaN."""
    masked = {"input_ids": [7, 8, 9, 10], "labels": [-100] * 4}
    data = Dataset.from_list([*rows(3).to_list(), masked])
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    for make in (sft, hf):
        extra = {"dataset_kwargs": {"skip_prepare_dataset": True}} if make is sft else {}
        stock, ours = both(
            lambda hasten, make=make, extra=extra: history(
                make(small("llama", hasten, lora()), data, tmp_path, **settings, **extra)
            )
        )
        assert_same_history(ours, stock, 1e-5)
        assert all(math.isfinite(value) for entry in ours for value in entry.values())
