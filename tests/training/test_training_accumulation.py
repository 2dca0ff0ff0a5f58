"""Gradient accumulation: eight examples give stock's loss and gradients, whatever the split into microbatches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_kit import (
    FAMILIES,
    Recorder,
    apart,
    dpo,
    gradients_apart,
    hf,
    logged,
    lora,
    preferences,
    rows,
    sft,
    small,
)

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
ALLOWED = 1e-5


def one_step(make: Any, model: Any, data: Any, folder: Path, split: tuple[int, int], **changes: Any) -> Any:
    """(loss, gradients) of one optimizer step over eight examples."""
    recorder = Recorder()
    batch, accumulation = split
    trainer = make(
        model,
        data,
        folder,
        {"callbacks": [recorder]},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **changes,
    )
    trainer.train()
    assert len(recorder.gradients) == 1
    return logged(trainer, "loss"), recorder.gradients[0]


@pytest.mark.grid(1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [sft, hf, dpo], ids=["SFT", "Trainer", "DPO"])
def test_splits_agree_with_each_other_and_with_stock(make: Any, family: str, tmp_path: Path) -> None:
    data = preferences(8, seed=4) if make is dpo else rows(8, seed=4)
    stock_loss, stock_gradients = one_step(make, small(family, False, lora()), data, tmp_path, SPLITS[0])
    assert min(float(g.norm()) for g in stock_gradients.values()) > 0
    for split in SPLITS:
        loss, gradients = one_step(make, small(family, True, lora()), data, tmp_path, split)
        assert apart(loss, stock_loss) < ALLOWED, split
        assert gradients_apart(gradients, stock_gradients) < ALLOWED, split


def test_rows_weigh_by_their_labels(tmp_path: Path) -> None:
    """Examples with very different numbers of labels: a mean of means would be far off, and must fail the comparison."""
    lengths = [40, 4, 30, 5, 20, 6, 10, 7]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(6, 200, (n,), generator=generator).tolist() for n in lengths]
    data = Dataset.from_list([{"input_ids": i, "labels": [-100] * (len(i) // 3) + i[len(i) // 3 :]} for i in ids])
    whole, gradients = one_step(sft, small("llama", True, lora()), data, tmp_path, (8, 1))
    split, split_gradients = one_step(sft, small("llama", True, lora()), data, tmp_path, (1, 8))
    assert apart(split, whole) < ALLOWED and gradients_apart(split_gradients, gradients) < ALLOWED

    model = small("llama", True, lora())
    means = [model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.detach() for row in data]
    assert apart(torch.stack(means).double().mean()[None], whole) > 100 * ALLOWED


def test_without_num_items_the_loss_is_the_mean_over_labels() -> None:
    """As stock does it, for callers that accumulate by themselves."""
    data = rows(4, longest=6, seed=1)
    length = min(len(row["input_ids"]) for row in data)
    batch = {key: torch.tensor([row[key][:length] for row in data]) for key in ("input_ids", "labels")}
    for extra in ({}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}):
        found = []
        for hasten in (False, True):
            model = small("gemma2", hasten, lora())
            loss = model(**batch, **extra).loss
            loss.backward()
            found.append((loss.detach()[None], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (stock_loss, stock), (loss, ours) = found
        assert apart(loss, stock_loss) < ALLOWED and gradients_apart(ours, stock) < ALLOWED
