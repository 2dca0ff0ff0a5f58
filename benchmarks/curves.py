"""Loss curves in bf16 on real text: does hasten train as stock transformers does, within what a seed changes?

    python -m benchmarks.gpu --out FOLDER --only curves
A tiny Llama is trained from scratch on the standard library's docstrings, then, from stock's result, a LoRA on its comments; stock
transformers + PEFT and hasten with the same seeds. A seed sets the initial weights, the LoRA and the order of the data.
"""

import argparse
import ast
import hashlib
import io
import multiprocessing
import statistics
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.jobs import Job
from benchmarks.harness.results import Record, line_of
from benchmarks.harness.steps import Steps
from benchmarks.harness.timing import DEVICE
from benchmarks.harness.variants import build, same_start

STAGES = {"full": "full fine-tuning from scratch", "lora": "LoRA on a second text"}
VARIANTS = {"stock": "transformers", "hasten": "hasten"}


@dataclass(frozen=True)
class Setting:
    """The model, the data and the training. smooth: steps averaged for a shown value."""

    layers: int = 8
    width: int = 256
    words: int = 4096
    batch: int = 16
    length: int = 256
    steps: int = 200
    seeds: int = 5
    files: int | None = None
    smooth: int = 10
    full_lr: float = 1e-3
    lora_lr: float = 2e-3
    processes: int = 5


def _sources(limit: int | None) -> Iterator[str]:
    """The standard library's files, always in the same order."""
    root = Path(sysconfig.get_path("stdlib"))
    elsewhere = {"site-packages", "dist-packages", "test", "tests"}
    paths = sorted(path for path in root.rglob("*.py") if not elsewhere & set(path.relative_to(root).parts))
    for path in paths[:limit]:
        yield path.read_text(encoding="utf-8")


def docstrings(limit: int | None = None) -> str:
    """Every docstring of the standard library's modules, classes and functions. limit: of files."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for source in _sources(limit) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(said for node in nodes if (said := ast.get_docstring(node)))


def comments(limit: int | None = None) -> str:
    """Every comment of the same files: English too, of another kind."""
    tokens = (t for source in _sources(limit) for t in tokenize.generate_tokens(io.StringIO(source).readline))
    lines = (token.string.lstrip("#! ") for token in tokens if token.type == tokenize.COMMENT)
    return "\n".join(line for line in lines if line)


def train_tokenizer(text: str, words: int) -> Any:
    """A byte-level BPE tokenizer of `words` entries, trained on `text`."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    tokenizer.train_from_iterator([text], words, min_frequency=0, show_progress=False, special_tokens=special)
    return tokenizer


def _train(variant: str, folder: Path, stage: str, setting: Setting, seed: int, tokens: torch.Tensor) -> Any:
    """Returns (the trained model, the loss of each step). The seed alone decides the order of the batches."""
    job = Job("curves", "tiny", stage, setting.batch, setting.length)
    model, loss = build(VARIANTS[variant], job, "keep", folder)
    same_start(model, seed, setting.width**-0.5)
    rate = setting.full_lr if stage == "full" else setting.lora_lr
    steps = Steps(model, loss, job, variant, rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    warm = max(1, setting.steps // 10)
    losses = []
    for step in range(setting.steps):
        for entry in steps.optimizer.param_groups:
            entry["lr"] = rate * min(1.0, (step + 1) / warm)
        starts = torch.randint(0, len(tokens) - setting.length, (setting.batch,), generator=generator)
        ids = torch.stack([tokens[at : at + setting.length] for at in starts.tolist()]).to(DEVICE)
        losses.append(steps.take(ids))
    return model, [float(loss) for loss in losses]


def run_seed(seed: int, setting: Setting, texts: dict[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """{stage: {variant: losses}} of one seed. Both variants' LoRA starts from stock's result of the first text."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from hasten.testing import tiny_tokenizer

    found: dict[str, dict[str, list[float]]] = {stage: {} for stage in STAGES}
    config = LlamaConfig(
        vocab_size=setting.words, hidden_size=setting.width, intermediate_size=4 * setting.width // 2,
        num_hidden_layers=setting.layers, num_attention_heads=setting.width // 64 or 1,
        num_key_value_heads=max(1, setting.width // 128), max_position_embeddings=setting.length,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folders = {"full": Path(name) / "initial", "lora": Path(name) / "trained"}
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folders["full"])
        for stage, folder in folders.items():
            tiny_tokenizer().save_pretrained(folder)
            for variant in VARIANTS:
                model, found[stage][variant] = _train(variant, folder, stage, setting, seed, texts[stage])
                if (variant, stage) == ("stock", "full"):
                    model.save_pretrained(folders["lora"])
    return found


def smoothed(losses: list[float], width: int) -> list[float]:
    """Means over the last `width` steps, from step `width` on."""
    return [sum(losses[i - width : i]) / width for i in range(width, len(losses) + 1)]


def summarise(stock: list[list[float]], hasten: list[list[float]], smooth: int) -> dict[str, Any]:
    """Compares two sets of curves, one curve per seed, in the same order.

    "low", "high": stock's range over seeds; "mean": hasten's mean; all per smoothed step. "inside": fraction of steps at which the
    mean lies in the range. "final_stock", "final_hasten": mean over seeds of the last value; "sigmas": their difference over the
    standard deviation of stock's seeds. "paired": the largest smoothed difference of two runs of one seed.
    """
    theirs, ours = [smoothed(run, smooth) for run in stock], [smoothed(run, smooth) for run in hasten]
    low, high = ([choose(step) for step in zip(*theirs, strict=True)] for choose in (min, max))
    mean = [statistics.fmean(step) for step in zip(*ours, strict=True)]
    inside = statistics.fmean(a <= m <= b for a, m, b in zip(low, mean, high, strict=True))
    final = [run[-1] for run in theirs]
    deviation = statistics.stdev(final) if len(final) > 1 else 0.0
    difference = mean[-1] - statistics.fmean(final)
    pairs = [abs(a - b) for one, two in zip(theirs, ours, strict=True) for a, b in zip(one, two, strict=True)]
    return {
        "low": low, "high": high, "mean": mean, "inside": inside, "final_stock": statistics.fmean(final),
        "final_hasten": mean[-1], "sigmas": difference / deviation if deviation else None, "paired": max(pairs),
    }  # fmt: skip


def measure(setting: Setting | None = None) -> dict[str, Any]:
    """{"setting", "text", "seconds", stage: summary}; one process per seed if `setting.processes` allows."""
    setting, begin = setting or Setting(), time.perf_counter()
    written = {"full": docstrings(setting.files), "lora": comments(setting.files)}
    tokenizer = train_tokenizer("".join(written.values()), setting.words)
    texts = {stage: torch.tensor(tokenizer.encode(text).ids) for stage, text in written.items()}
    prepared = time.perf_counter() - begin
    seeds, given = range(setting.seeds), (repeat(setting), repeat(texts))
    if setting.processes > 1:
        with ProcessPoolExecutor(setting.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(run_seed, seeds, *given))
    else:
        found = list(map(run_seed, seeds, *given))
    stages = {
        stage: summarise(
            *[[run[stage][variant] for run in found] for variant in ("stock", "hasten")], smooth=setting.smooth
        )
        for stage in STAGES
    }
    text = {
        stage: {
            "characters": len(said),
            "tokens": len(texts[stage]),
            "sha256": hashlib.sha256(said.encode()).hexdigest(),
        }
        for stage, said in written.items()
    }
    seconds = {"text": prepared, "all": time.perf_counter() - begin}
    return {"setting": asdict(setting), "text": text, "seconds": seconds, **stages}


def run(args: argparse.Namespace, record: Record) -> bool:
    found = measure()
    record.put("curves", found, *(f"curves, {title}: {line_of(found[stage])}" for stage, title in STAGES.items()))
    return True
