"""Real tokens a second on ragged rows: padded batches against packed and padding-free ones, all with hasten and LoRA.

    python -m benchmarks.packing_speed --out FOLDER --checkpoints FOLDER          writes FOLDER/packing.json
Row lengths are drawn from a log-normal distribution that looks like a set of short instructions and answers with a long
tail. Every way trains on the same rows in a step: forward and backward of its batches under bf16 autocast, then fused AdamW.
Batches are made by TRL's own collator and packing, beforehand.
"""

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.jobs import SHAPES, Job
from benchmarks.shapes import checkpoint
from benchmarks.train_step import DEVICE, LEARNING_RATE, forget_peaks, peaks, wait
from benchmarks.variants import build

WAYS: dict[str, tuple[str, int | None]] = {
    "padded": ("batches of 64, padded on the right to the longest", None),
    "padding-free": ("batches of 64, one behind the other", None),
    "packed-4096": ("packed to 4,096 tokens", 4096),
    "packed-16384": ("packed to 16,384 tokens", 16384),
}
"""Way -> (in words, tokens of a packed row)."""
PARITY = 2e-3
"""By how much of itself a loss may be off the padded one; in bf16 other shapes sum in another order."""


@dataclass(frozen=True)
class Setting:
    """The rows and the measurement. median, sigma: of the log-normal lengths, in tokens. steps: different sets of rows."""

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
    """For each step its rows of random tokens, every one of which is learned."""
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
    """What TRL's trainer would hand to the model, on the device."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=way != "padded")
    tokens = WAYS[way][1]
    if tokens is None:
        groups = [rows[i : i + setting.batch] for i in range(0, len(rows), setting.batch)]
    else:
        groups = [[row] for row in pack_dataset(Dataset.from_list(rows), tokens, "bfd")]  # pyright: ignore
    made = [collate(group) for group in groups]
    return [{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for batch in made]


class Trainer:
    """Steps of one model on whatever batches come. Every step's loss is the mean over its labels, however it is split."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, fused=True)

    def gradients(self, made: Iterable[Batch], labels: int) -> torch.Tensor:
        """Leaves gradients behind and returns the loss."""
        losses = []
        for batch in made:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = self.model(**batch, num_items_in_batch=torch.tensor(labels, device=DEVICE), use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def seconds(self, made: list[Batch], labels: int) -> float:
        wait()
        begin = time.perf_counter()
        self.gradients(made, labels)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait()
        return time.perf_counter() - begin

    def look(self, made: list[Batch], labels: int) -> tuple[float, float]:
        """(loss, norm of all gradients), nothing stepped."""
        loss = float(self.gradients(made, labels))
        norm = float(torch.stack([p.grad.float().norm() for p in self.trained if p.grad is not None]).norm())
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm


def measure(setting: Setting, checkpoints: Path) -> dict[str, Any]:
    """{"setting", "lengths", "ways": rows}. A way whose loss is off the padded one's by more than PARITY has no figures."""
    job = Job("packing", setting.shape, "lora", setting.batch, setting.longest)
    model, _ = build("hasten", job, "keep", checkpoint(setting.shape, checkpoints))
    trainer, steps = Trainer(model), draw_steps(setting)
    labels = [sum(len(row["input_ids"]) - 1 for row in rows) for rows in steps]
    made = {way: [batches(rows, way, setting) for rows in steps] for way in WAYS}
    seen = {way: trainer.look(made[way][0], labels[0]) for way in WAYS}
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    most = dict.fromkeys(WAYS, 0.0)
    for turn in range(1 + setting.rounds):  # the first one compiles
        for index in range(len(steps)):
            for way in WAYS:
                forget_peaks()
                seconds = trainer.seconds(made[way][index], labels[index])
                if turn:
                    taken[way].append(seconds)
                    most[way] = max(most[way], peaks()["peak_gib"])
    real = sum(len(row["input_ids"]) for rows in steps for row in rows)
    ways = []
    for way in WAYS:
        computed = sum(batch["input_ids"].numel() for step in made[way] for batch in step)
        off, norm_off = (abs(a - b) / abs(b) for a, b in zip(seen[way], seen["padded"], strict=True))
        row = {"way": way, "batches": sum(map(len, made[way])), "computed_tokens": computed, "loss_off": off,
               "gradient_norm_off": norm_off}  # fmt: skip
        if off <= PARITY:
            # Medians over rounds of each step, then all steps: a step's rows are the same in every way.
            each = [statistics.median(taken[way][index :: len(steps)]) for index in range(len(steps))]
            row |= {"ms": sum(each) / len(each) * 1e3, "tokens_per_s": real / sum(each), "peak_gib": most[way]}
        ways.append(row)
    return {"setting": asdict(setting), "lengths": describe(steps), "real_tokens": real, "ways": ways}


def say(found: dict[str, Any]) -> list[str]:
    """One line per way."""
    return [
        f"{row['way']:14s} {row['computed_tokens']:8d} tokens for {found['real_tokens']} real ones  "
        + (f"{row['ms']:8.1f} ms  {row['tokens_per_s']:9.0f} real tokens/s" if "ms" in row else "PARITY FAILED")
        + f"  loss off by {row['loss_off']:.1e}, gradients' norm by {row['gradient_norm_off']:.1e}"
        for row in found["ways"]
    ]


def run(setting: Setting, out: Path, checkpoints: Path) -> int:
    """Measures, writes `packing.json` into `out`, says what was found. 1 where a way's loss is off."""
    for folder in (out, checkpoints):
        folder.mkdir(parents=True, exist_ok=True)
    found = measure(setting, checkpoints)
    result = {"date": datetime.date.today().isoformat(), "versions": results.versions(), "packing": found}
    results.write(result, out / "packing.json")
    print("\n".join(say(found)))
    return 0 if all("ms" in row for row in found["ways"]) else 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default=Setting.shape)
    args = parser.parse_args(arguments)
    return run(Setting(shape=args.shape), args.out, args.checkpoints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
