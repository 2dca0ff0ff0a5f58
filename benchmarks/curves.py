"""Loss curves in bf16 on real text: does hasten train as stock transformers does, within what a seed changes?

    python -m benchmarks.curves --out FILE.json
A tiny Llama is trained from scratch on the standard library's docstrings, then, from stock's result, a LoRA on its
comments; stock transformers + PEFT and hasten each with the same seeds. A seed draws the first weights, the LoRA and the
order of the data.
"""

import argparse
import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = ("stock", "hasten")
STAGES = {"full": "full fine-tuning from scratch", "lora": "LoRA on a second text"}


@dataclass(frozen=True)
class Setting:
    """The model, the data and the training. smooth: steps that a shown value is the mean of."""

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


@dataclass(frozen=True)
class Texts:
    """Token ids (tokens,) of both texts."""

    full: torch.Tensor
    lora: torch.Tensor


def _config(setting: Setting) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=setting.words, hidden_size=setting.width, intermediate_size=4 * setting.width // 2,
        num_hidden_layers=setting.layers, num_attention_heads=setting.width // 64 or 1,
        num_key_value_heads=max(1, setting.width // 128), max_position_embeddings=setting.length,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _load(variant: str, folder: Path, stage: str, setting: Setting, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from benchmarks.variants import ALPHA, LINEARS, RANK
    from hasten import FastLanguageModel

    if variant == "hasten":
        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=setting.length, dtype=torch.bfloat16, load_in_4bit=False,
            load_in_16bit=stage == "lora", full_finetuning=stage == "full", use_gradient_checkpointing=False,
            fix_tokenizer=False, device_map=DEVICE,
        )  # fmt: skip
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE)
    if stage == "lora" and variant == "hasten":
        model = FastLanguageModel.get_peft_model(
            model, r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, use_gradient_checkpointing=False
        )
    elif stage == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * setting.width**-0.5
            parameter.data = drawn.to(parameter.device, parameter.dtype)
    return model.train()


def _train(model: Any, tokens: torch.Tensor, setting: Setting, seed: int, rate: float) -> list[float]:
    """The loss of each step. Batches are drawn from `tokens` in an order that the seed alone decides."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    warm = max(1, setting.steps // 10)
    losses = []
    for step in range(setting.steps):
        for entry in optimizer.param_groups:
            entry["lr"] = rate * min(1.0, (step + 1) / warm)
        starts = torch.randint(0, len(tokens) - setting.length, (setting.batch,), generator=generator)
        ids = torch.stack([tokens[at : at + setting.length] for at in starts.tolist()]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def run_seed(seed: int, setting: Setting, texts: Texts) -> dict[str, dict[str, list[float]]]:
    """{stage: {variant: losses}} of one seed. Both variants' LoRA starts from what stock made of the first text."""
    from transformers import AutoModelForCausalLM

    from hasten.testing import tiny_tokenizer

    found: dict[str, dict[str, list[float]]] = {stage: {} for stage in STAGES}
    with tempfile.TemporaryDirectory() as name:
        begin, taught = Path(name) / "begin", Path(name) / "taught"
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(_config(setting), dtype=torch.bfloat16).save_pretrained(begin)
        tiny_tokenizer().save_pretrained(begin)
        for variant in VARIANTS:
            model = _load(variant, begin, "full", setting, seed)
            found["full"][variant] = _train(model, texts.full, setting, seed, setting.full_lr)
            if variant == "stock":
                model.save_pretrained(taught)
                tiny_tokenizer().save_pretrained(taught)
        for variant in VARIANTS:
            model = _load(variant, taught, "lora", setting, seed)
            found["lora"][variant] = _train(model, texts.lora, setting, seed, setting.lora_lr)
    return found


def smoothed(losses: list[float], width: int) -> list[float]:
    """Means over the last `width` steps, from step `width` on."""
    return [sum(losses[i - width : i]) / width for i in range(width, len(losses) + 1)]


def summarise(stock: list[list[float]], hasten: list[list[float]], smooth: int) -> dict[str, Any]:
    """What two sets of curves, one per seed and in the same order, say.

    "low", "high": stock's spread over seeds; "mean": hasten's mean; all per smoothed step. "inside": the share of steps at
    which the mean lies in the spread. "final_stock", "final_hasten": mean over seeds of the last value; "sigmas": their difference
    over the standard deviation of stock's seeds. "paired": the largest smoothed difference of two runs of one seed.
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


def measure_all(setting: Setting | None = None) -> dict[str, Any]:
    """{"setting", "text", "seconds", stage: summary}; one process per seed, where more than one may run."""
    from benchmarks.text import comments, docstrings, train_tokenizer

    setting, begin = setting or Setting(), time.perf_counter()
    written, second = docstrings(setting.files), comments(setting.files)
    tokenizer = train_tokenizer(written + second, setting.words)
    texts = Texts(*(torch.tensor(tokenizer.encode(text).ids) for text in (written, second)))
    prepared = time.perf_counter() - begin
    if setting.processes > 1:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(setting.processes, mp_context=spawn) as pool:
            runs = [pool.submit(run_seed, seed, setting, texts) for seed in range(setting.seeds)]
            found = [run.result() for run in runs]
    else:
        found = [run_seed(seed, setting, texts) for seed in range(setting.seeds)]
    stages = {
        stage: summarise(
            [run[stage]["stock"] for run in found], [run[stage]["hasten"] for run in found], setting.smooth
        )
        for stage in STAGES
    }
    text = {
        name: {"characters": len(said), "tokens": len(ids), "sha256": hashlib.sha256(said.encode()).hexdigest()}
        for name, said, ids in (("full", written, texts.full), ("lora", second, texts.lora))
    }
    seconds = {"text": prepared, "all": time.perf_counter() - begin}
    return {"setting": asdict(setting), "text": text, "seconds": seconds, **stages}


def say(curves: dict[str, Any]) -> list[str]:
    """One line per stage."""
    return [
        f"curves, {title}: hasten's mean inside stock's spread at {curves[stage]['inside']:.0%} of steps; final "
        f"{curves[stage]['final_hasten']:.4f} against {curves[stage]['final_stock']:.4f} "
        f"({_sigmas(curves[stage]['sigmas'])}); same seed at most {curves[stage]['paired']:.4f} apart; "
        f"{curves['seconds']['all']:.0f} s"
        for stage, title in STAGES.items()
    ]


def _sigmas(value: float | None) -> str:
    return "one seed" if value is None else f"{value:+.2f} standard deviations of stock's seeds"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    curves = measure_all()
    args.out.write_text(json.dumps({"curves": curves}, indent=1))
    print("\n".join(say(curves)))


if __name__ == "__main__":
    main(sys.argv[1:])
