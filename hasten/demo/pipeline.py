"""Runs the demo end to end and prints its progress. Raises AccuracyError if a check fails."""

import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.syntax import Syntax

import hasten
from hasten.demo.base import BaseSize, pretrain
from hasten.demo.corpus import Corpus, build
from hasten.demo.evaluate import Score, score
from hasten.demo.show import SETS, show_answers, show_figures, shown
from hasten.demo.verify import Agreement, compare_in_plain_transformers
from hasten.errors import AccuracyError
from hasten.model import FastLanguageModel
from hasten.training.config import read_job
from hasten.training.curve import sparkline
from hasten.training.job import Finished, run
from hasten.training.metrics import MetricsFile, losses


@dataclass(frozen=True)
class Size:
    """Size of the demo. facts: number of facts about the standard library. epochs: of fine-tuning. batch: examples per
    fine-tuning step."""

    facts: int
    base: BaseSize
    epochs: int
    rank: int
    learning_rate: float = 2e-3
    batch: int = 16


FULL = Size(facts=250, base=BaseSize(hidden=256, layers=4, vocabulary=2048, steps=700), epochs=6, rank=32)
QUICK = Size(facts=60, base=BaseSize(hidden=128, layers=2, vocabulary=768, steps=160), epochs=4, rank=16)


@dataclass
class DemoRun:
    """Settings and results so far. seconds: wall time of each step."""

    out: Path
    size: Size
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.out / "base"

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Prints a heading and records the wall time of the block."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        start = time.monotonic()
        yield
        self.seconds[title] = round(time.monotonic() - start, 1)


def run_demo(out: Path, console: Console, size: Size = FULL) -> dict[str, Any]:
    """Runs the demo, writes its artefacts to `out`, and returns the content of summary.json.

    Artefacts: base/ and model/ (adapter) and merged/, train.jsonl, job.yaml, metrics.jsonl, loss.png, answers.json,
    report.txt, logits.json, summary.json. Raises AccuracyError if a held-out loss did not decrease, or if the
    merged model's logits differ from those of base + adapter by more than rounding.
    """
    demo = DemoRun(out.resolve(), size, console)
    demo.out.mkdir(parents=True, exist_ok=True)
    with demo.step("Dataset: questions about the Python standard library"):
        corpus = _collect(demo)
    with demo.step("Pretrain a base model from random weights"):
        _pretrain(demo, corpus)
    with demo.step("Answers of the base model, loaded in 4 bits"):
        before = _before(demo, corpus)
    with demo.step("Fine-tune with QLoRA: TRL's SFTTrainer on a hasten model"):
        finished = _finetune(demo)
    with demo.step("Answers after fine-tuning"):
        after = _after(demo, corpus, finished, before)
    with demo.step("Merge to 16 bits, reload in plain transformers"):
        agreement = _merge(demo, corpus, finished)
    summary = _summary(demo, before, after, agreement)
    _check(before, after, agreement)
    console.print(
        f"\n[bold green]Done in {sum(demo.seconds.values()):.0f} s.[/] Everything is in {escape(str(out))}", emoji=False
    )
    return summary


def _collect(demo: DemoRun) -> Corpus:
    corpus = build(demo.size.facts)
    with (demo.out / "train.jsonl").open("w", encoding="utf-8") as file:
        for question in corpus.train:
            file.write(json.dumps({"messages": question.messages()}) + "\n")
    first = corpus.train[len(corpus.train) // 2]
    lines = [
        f"[bold]{len(corpus.train)}[/] training examples, nothing downloaded. One of them:",
        f"  [cyan]{escape(first.question)}[/]  ->  {escape(first.answer)}",
        "Held-out questions:",
        *(f"  [bold]{len(getattr(corpus, name))} {name}[/]: {what}" for name, what in SETS.items()),
    ]
    demo.console.print("\n".join(lines))
    return corpus


def _pretrain(demo: DemoRun, corpus: Corpus) -> None:
    size = demo.size.base
    parameters = sum(p.numel() for p in _shape(size).parameters())
    demo.console.print(
        f"Llama with {size.layers} layers of width {size.hidden}, {parameters / 1e6:.1f} M parameters, byte-level BPE; "
        f"trained on {len(corpus.documents)} short documents for {size.steps} steps."
    )
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(24), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, console=demo.console) as progress:
        task = progress.add_task("", total=size.steps, loss="")
        curve = pretrain(
            corpus.documents,
            size,
            demo.base,
            lambda step, loss: progress.update(task, completed=step, loss=f"{loss:.3f}"),
        )
    demo.console.print(f"loss {curve[0]:.2f} {sparkline(curve)} {curve[-1]:.2f}")


def _before(demo: DemoRun, corpus: Corpus) -> dict[str, Score]:
    model, tokenizer = FastLanguageModel.from_pretrained(str(demo.base), **_model_options())
    scores = _scores(FastLanguageModel.for_inference(model), tokenizer, corpus)
    for question, answer in shown(corpus, scores)[:2]:
        demo.console.print(f"  [cyan]{escape(question.question)}[/]  ->  [red]{escape(answer) or '(nothing)'}[/]")
    demo.console.print("It was pretrained on the documentation, but not trained to answer questions.")
    return scores


def _finetune(demo: DemoRun) -> Finished:
    job = {
        "model": {"model_name": "base", **_model_options()},
        "adapter": {"r": demo.size.rank, "lora_alpha": 2 * demo.size.rank},
        "data": {"path": "train.jsonl", "too_long": "error"},
        "train": {
            "output_dir": ".",
            "assistant_only_loss": True,
            "num_train_epochs": demo.size.epochs,
            "per_device_train_batch_size": demo.size.batch,
            "learning_rate": demo.size.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "save_strategy": "no",
            "seed": 3407,
        },
    }
    path = demo.out / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    shown = Syntax(path.read_text(encoding="utf-8"), "yaml", background_color="default")
    demo.console.print(Panel(shown, title=f"hasten train {escape(path.name)}", title_align="left", expand=False))
    finished = run(read_job(path), FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model, demo.console)
    curve = [loss for _, loss in losses(MetricsFile(demo.out / "metrics.jsonl").rows())]
    demo.console.print(f"loss {curve[0]:.2f} {sparkline(curve)} {curve[-1]:.2f}   {finished.counts}")
    return finished


def _after(demo: DemoRun, corpus: Corpus, finished: Finished, before: dict[str, Score]) -> dict[str, Score]:
    after = _scores(FastLanguageModel.for_inference(finished.model), finished.tokenizer, corpus)
    show_answers(demo.console, shown(corpus, before), shown(corpus, after))
    show_figures(demo.console, before, after)
    answers = [
        {"set": name, **asdict(question), "before": old, "after": new}
        for name in SETS
        for question, old, new in zip(getattr(corpus, name), before[name].answers, after[name].answers, strict=True)
    ]
    _write_json(demo.out / "answers.json", answers)
    report = str(hasten.report(finished.model))
    (demo.out / "report.txt").write_text(report + "\n", encoding="utf-8")
    demo.console.print(Panel(escape(report), title="hasten.report(model)", title_align="left", expand=False))
    return after


def _merge(demo: DemoRun, corpus: Corpus, finished: Finished) -> Agreement:
    merged = demo.out / "merged"
    finished.model.save_pretrained_merged(merged, finished.tokenizer, save_method="merged_16bit")
    agreement = compare_in_plain_transformers(
        demo.base, finished.saved, merged, finished.tokenizer, [*corpus.reworded, *corpus.untaught], demo.out
    )
    demo.console.print(
        f"{agreement.tokens} tokens, in a new process without hasten: logits of the merged model differ from "
        f"base + adapter by at most [bold]{agreement.max_difference:.4f}[/] (the adapter itself changes them by up to "
        f"{agreement.max_effect_of_adapter:.1f}); the RMS difference is {agreement.share:.2%} of the adapter's effect; "
        f"the most likely token is the same at {agreement.same_argmax:.2%} of positions"
    )
    return agreement


def _summary(demo: DemoRun, before: Any, after: Any, agreement: Agreement) -> dict[str, Any]:
    def figures(scores: dict[str, Score]) -> dict[str, Any]:
        return {name: {"loss": s.loss, "exact": s.exact, "total": s.total} for name, s in scores.items()}

    summary = {
        "held_out": {"before": figures(before), "after": figures(after)},
        "merge": {**asdict(agreement), "share": agreement.share},
        "seconds": {**demo.seconds, "total": round(sum(demo.seconds.values()), 1)},
        "size": asdict(demo.size),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    _write_json(demo.out / "summary.json", summary)
    return summary


def _check(before: dict[str, Score], after: dict[str, Score], agreement: Agreement) -> None:
    for name in SETS:
        if not after[name].loss < before[name].loss:
            raise AccuracyError(
                f"fine-tuning did not help: loss on the {name} questions was {before[name].loss:.4f} before and is "
                f"{after[name].loss:.4f} after"
            )
    agreement.check()


def _model_options() -> dict[str, Any]:
    """Returns the loading arguments. Sequences are short, so activation checkpointing is off."""
    return {"max_seq_length": 128, "load_in_4bit": True, "use_gradient_checkpointing": False}


def _scores(model: Any, tokenizer: Any, corpus: Corpus) -> dict[str, Score]:
    return {name: score(model, tokenizer, getattr(corpus, name)) for name in SETS}


def _shape(size: BaseSize) -> Any:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(size.config())


def _write_json(path: Path, value: Sequence[Any] | dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
