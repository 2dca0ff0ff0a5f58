"""Real tokens a second on sequences of unequal length: padded batches against packed and padding-free ones, with hasten and LoRA.

    python -m benchmarks.gpu --out FOLDER --only packing
Lengths are log-normal, like short instructions and answers with a long tail. Every way trains on the same sequences in a step:
forward and backward of its batches under bf16 autocast, then fused AdamW. TRL's collator and packing make the batches beforehand.
"""

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.jobs import SHAPES, Job
from benchmarks.harness.results import Record, line_of
from benchmarks.harness.steps import Steps, load, peaks, reset_peaks
from benchmarks.harness.timing import DEVICE

WAYS: dict[str, tuple[str, int | None]] = {
    "padded": ("batches of 64, padded on the right to the longest", None),
    "padding-free": ("batches of 64, concatenated", None),
    "packed-4096": ("packed to 4,096 tokens", 4096),
    "packed-16384": ("packed to 16,384 tokens", 16384),
}
"""Way -> (description, tokens of a packed sequence)."""
PARITY = 2e-3
"""Largest relative difference from the padded loss; bf16 sums of other shapes round differently."""


@dataclass(frozen=True)
class Setting:
    """median, sigma: of the log-normal lengths, in tokens. rows: sequences a step. steps: different sets of sequences."""

    shape: str = "llama-1b"
    median: float = 150.0
    sigma: float = 0.6
    shortest: int = 16
    longest: int = 1024
    rows: int = 256
    batch: int = 64
    steps: int = 3
    rounds: int = 5
    seed: int = 11


Rows = list[dict[str, list[int]]]
Batch = dict[str, Any]


def draw_steps(setting: Setting) -> list[Rows]:
    """Random token ids of each step's sequences; every token is a label."""
    generator = torch.Generator().manual_seed(setting.seed)
    words = SHAPES[setting.shape]["vocab_size"]
    found = []
    for _ in range(setting.steps):
        drawn = setting.median * torch.exp(setting.sigma * torch.randn(setting.rows, generator=generator))
        lengths = drawn.round().clamp(setting.shortest, setting.longest).int().tolist()
        ids = [torch.randint(10, words, (length,), generator=generator).tolist() for length in lengths]
        found.append([{"input_ids": one, "labels": one} for one in ids])
    return found


def describe(steps: list[Rows]) -> dict[str, float]:
    """Mean and percentiles of the lengths, in tokens."""
    lengths = torch.tensor([len(row["input_ids"]) for rows in steps for row in rows], dtype=torch.float64)
    shares = {f"p{share}": float(lengths.quantile(share / 100)) for share in (10, 25, 50, 75, 90, 99)}
    return {"rows": len(lengths), "mean": float(lengths.mean()), **shares, "max": float(lengths.max())}


def batches(rows: Rows, way: str, setting: Setting) -> list[Batch]:
    """What TRL's trainer would give to the model, on the device."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=way != "padded")
    tokens = WAYS[way][1]
    if tokens is None:
        groups = [rows[i : i + setting.batch] for i in range(0, len(rows), setting.batch)]
    else:
        groups = [[row] for row in pack_dataset(Dataset.from_list(rows), tokens, "bfd")]  # pyright: ignore
    labels = torch.tensor(sum(len(row["input_ids"]) - 1 for row in rows))
    made = [{**collate(group), "num_items_in_batch": labels} for group in groups]
    return [{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in made]


def look(steps: Steps, made: list[Batch]) -> tuple[float, float]:
    """(loss, norm of all gradients), without an optimizer step."""
    loss = float(steps.gradients(*made))
    norm = float(torch.stack([p.grad.float().norm() for p in steps.trained if p.grad is not None]).norm())
    steps.optimizer.zero_grad(set_to_none=True)
    return loss, norm


def measure(setting: Setting, checkpoints: Path) -> dict[str, Any]:
    """{"setting", "lengths", "real_tokens", "ways": rows}. A way whose loss differs by more than PARITY has no figures."""
    job = Job("packing", setting.shape, "lora", setting.batch, setting.longest)
    _, trainer = load("hasten", job, "keep", checkpoints)
    trainer.loss = lambda batch: trainer.model(**batch, use_cache=False).loss
    drawn = draw_steps(setting)
    made = {way: [batches(rows, way, setting) for rows in drawn] for way in WAYS}
    seen = {way: look(trainer, made[way][0]) for way in WAYS}
    taken: dict[str, list[list[float]]] = {way: [[] for _ in drawn] for way in WAYS}
    most = dict.fromkeys(WAYS, 0.0)
    for turn in range(1 + setting.rounds):  # the first one compiles
        for index in range(len(drawn)):
            for way in WAYS:
                reset_peaks()
                seconds, _ = trainer.timed(*made[way][index])
                if turn:
                    taken[way][index].append(seconds)
                    most[way] = max(most[way], peaks()["peak_gib"])
    real = sum(len(row["input_ids"]) for rows in drawn for row in rows)
    ways = []
    for way in WAYS:
        computed = sum(batch["input_ids"].numel() for step in made[way] for batch in step)
        off, norm_off = (abs(a - b) / abs(b) for a, b in zip(seen[way], seen["padded"], strict=True))
        row = {"way": way, "batches": sum(map(len, made[way])), "computed_tokens": computed, "loss_off": off,
               "gradient_norm_off": norm_off, "ok": off <= PARITY}  # fmt: skip
        if row["ok"]:
            each = [statistics.median(rounds) for rounds in taken[way]]
            row |= {"ms": sum(each) / len(each) * 1e3, "tokens_per_s": real / sum(each), "peak_gib": most[way]}
        ways.append(row)
    return {"setting": asdict(setting), "lengths": describe(drawn), "real_tokens": real, "ways": ways}


def run(args: argparse.Namespace, record: Record) -> bool:
    """Returns whether the losses of all ways agree."""
    found = measure(Setting(), args.checkpoints)
    record.put("packing", found, *map(line_of, found["ways"]))
    return all(row["ok"] for row in found["ways"])
