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
class Story:
    """Settings and results so far. seconds: wall time of each chapter."""

    out: Path
    size: Size
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.out / "base"

    @contextmanager
    def chapter(self, title: str) -> Iterator[None]:
        """Prints a heading and records the wall time of the block."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        start = time.monotonic()
        yield
        self.seconds[title] = round(time.monotonic() - start, 1)


def tell(out: Path, console: Console, size: Size = FULL) -> dict[str, Any]:
    """Runs the demo, writes its artefacts to `out`, and returns the content of summary.json.

    Artefacts: base/ and model/ (adapter) and merged/, train.jsonl, job.yaml, metrics.jsonl, loss.png, answers.json,
    report.txt, logits.json, summary.json. Raises AccuracyError if a held-out loss did not decrease, or if the
    merged model's logits differ from those of base + adapter by more than rounding.
    """
    story = Story(out.resolve(), size, console)
    story.out.mkdir(parents=True, exist_ok=True)
    with story.chapter("Dataset: questions about the Python standard library"):
        corpus = _collect(story)
    with story.chapter("Pretrain a base model from random weights"):
        _pretrain(story, corpus)
    with story.chapter("Answers of the base model, loaded in 4 bits"):
        before = _before(story, corpus)
    with story.chapter("Fine-tune with QLoRA: TRL's SFTTrainer on a hasten model"):
        finished = _finetune(story)
    with story.chapter("Answers after fine-tuning"):
        after = _after(story, corpus, finished, before)
    with story.chapter("Merge to 16 bits, reload in plain transformers"):
        agreement = _merge(story, corpus, finished)
    summary = _summary(story, before, after, agreement)
    _check(before, after, agreement)
    console.print(f"\n[bold green]Done in {sum(story.seconds.values()):.0f} s.[/] Everything is in {out}")
    return summary


def _collect(story: Story) -> Corpus:
    corpus = build(story.size.facts)
    with (story.out / "train.jsonl").open("w", encoding="utf-8") as file:
        for question in corpus.train:
            file.write(json.dumps({"messages": question.messages()}) + "\n")
    first = corpus.train[len(corpus.train) // 2]
    lines = [
        f"[bold]{len(corpus.train)}[/] training examples, nothing downloaded. One of them:",
        f"  [cyan]{escape(first.question)}[/]  ->  {escape(first.answer)}",
        "Held-out questions:",
        *(f"  [bold]{len(getattr(corpus, name))} {name}[/]: {what}" for name, what in SETS.items()),
    ]
    story.console.print("\n".join(lines))
    return corpus


def _pretrain(story: Story, corpus: Corpus) -> None:
    size = story.size.base
    parameters = sum(p.numel() for p in _shape(size).parameters())
    story.console.print(
        f"Llama with {size.layers} layers of width {size.hidden}, {parameters / 1e6:.1f} M parameters, byte-level BPE; "
        f"trained on {len(corpus.documents)} short documents for {size.steps} steps."
    )
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(24), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, console=story.console) as progress:
        task = progress.add_task("", total=size.steps, loss="")
        curve = pretrain(
            corpus.documents,
            size,
            story.base,
            lambda step, loss: progress.update(task, completed=step, loss=f"{loss:.3f}"),
        )
    story.console.print(f"loss {curve[0]:.2f} {sparkline(curve)} {curve[-1]:.2f}")


def _before(story: Story, corpus: Corpus) -> dict[str, Score]:
    model, tokenizer = FastLanguageModel.from_pretrained(str(story.base), **_model_options())
    scores = _scores(FastLanguageModel.for_inference(model), tokenizer, corpus)
    for question, answer in shown(corpus, scores)[:2]:
        story.console.print(f"  [cyan]{escape(question.question)}[/]  ->  [red]{escape(answer) or '(nothing)'}[/]")
    story.console.print("It was pretrained on the documentation, but not trained to answer questions.")
    return scores


def _finetune(story: Story) -> Finished:
    job = {
        "model": {"model_name": "base", **_model_options()},
        "adapter": {"r": story.size.rank, "lora_alpha": 2 * story.size.rank},
        "data": {"path": "train.jsonl", "too_long": "error"},
        "train": {
            "output_dir": ".",
            "assistant_only_loss": True,
            "num_train_epochs": story.size.epochs,
            "per_device_train_batch_size": story.size.batch,
            "learning_rate": story.size.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "save_strategy": "no",
            "seed": 3407,
        },
    }
    path = story.out / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
    shown = Syntax(path.read_text(encoding="utf-8"), "yaml", background_color="default")
    story.console.print(Panel(shown, title=f"hasten train {path.name}", title_align="left", expand=False))
    finished = run(read_job(path), FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model, story.console)
    curve = [loss for _, loss in losses(MetricsFile(story.out / "metrics.jsonl").rows())]
    story.console.print(f"loss {curve[0]:.2f} {sparkline(curve)} {curve[-1]:.2f}   {finished.counts}")
    return finished


def _after(story: Story, corpus: Corpus, finished: Finished, before: dict[str, Score]) -> dict[str, Score]:
    after = _scores(FastLanguageModel.for_inference(finished.model), finished.tokenizer, corpus)
    show_answers(story.console, shown(corpus, before), shown(corpus, after))
    show_figures(story.console, before, after)
    answers = [
        {"set": name, **asdict(question), "before": old, "after": new}
        for name in SETS
        for question, old, new in zip(getattr(corpus, name), before[name].answers, after[name].answers, strict=True)
    ]
    _write_json(story.out / "answers.json", answers)
    report = str(hasten.report(finished.model))
    (story.out / "report.txt").write_text(report + "\n", encoding="utf-8")
    story.console.print(Panel(escape(report), title="hasten.report(model)", title_align="left", expand=False))
    return after


def _merge(story: Story, corpus: Corpus, finished: Finished) -> Agreement:
    merged = story.out / "merged"
    finished.model.save_pretrained_merged(merged, finished.tokenizer, save_method="merged_16bit")
    agreement = compare_in_plain_transformers(
        story.base, finished.saved, merged, finished.tokenizer, [*corpus.reworded, *corpus.untaught], story.out
    )
    story.console.print(
        f"{agreement.tokens} tokens, in a new process without hasten: logits of the merged model differ from "
        f"base + adapter by at most [bold]{agreement.max_difference:.4f}[/] (the adapter itself changes them by up to "
        f"{agreement.max_effect_of_adapter:.1f}); the RMS difference is {agreement.share:.2%} of the adapter's effect; "
        f"the most likely token is the same at {agreement.same_argmax:.2%} of positions"
    )
    return agreement


def _summary(story: Story, before: Any, after: Any, agreement: Agreement) -> dict[str, Any]:
    def figures(scores: dict[str, Score]) -> dict[str, Any]:
        return {name: {"loss": s.loss, "exact": s.exact, "total": s.total} for name, s in scores.items()}

    summary = {
        "held_out": {"before": figures(before), "after": figures(after)},
        "merge": {**asdict(agreement), "share": agreement.share},
        "seconds": {**story.seconds, "total": round(sum(story.seconds.values()), 1)},
        "size": asdict(story.size),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    _write_json(story.out / "summary.json", summary)
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
