"""Prints the demo's tables: answers to held-out questions before and after fine-tuning, and scores."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hasten.demo.corpus import Corpus, Question
from hasten.demo.evaluate import Score

SETS = {
    "reworded": "facts of the training set, in a wording that is not in it",
    "untaught": "facts that are not in the training set (the base was pretrained on their documentation)",
}
SHOWN = 4


def shown(corpus: Corpus, scores: dict[str, Score]) -> list[tuple[Question, str]]:
    """Selects some questions of each set, with the model's answers."""
    counts = {"reworded": SHOWN, "untaught": SHOWN // 2}
    return [
        pair
        for name, count in counts.items()
        for pair in list(zip(getattr(corpus, name), scores[name].answers, strict=True))[:count]
    ]


def show_answers(
    console: Console, before: Sequence[tuple[Question, str]], after: Sequence[tuple[Question, str]]
) -> None:
    table = Table(show_header=False, title="held-out questions", title_justify="left")
    for (question, old), (_, new) in zip(before, after, strict=True):
        colour = "green" if new == question.answer else "yellow"
        table.add_row("question", f"[cyan]{escape(question.question)}[/]")
        table.add_row("expected", escape(question.answer))
        table.add_row("before", f"[red]{escape(old) or '(nothing)'}[/]")
        table.add_row("after", f"[{colour}]{escape(new) or '(nothing)'}[/]", end_section=True)
    console.print(table)


def show_figures(console: Console, before: dict[str, Score], after: dict[str, Score]) -> None:
    table = Table("held out", "loss before", "loss after", "exact before", "exact after")
    for name in SETS:
        old, new = before[name], after[name]
        exact = [f"{score.exact} of {score.total}" for score in (old, new)]
        table.add_row(name, f"{old.loss:.3f}", f"[bold]{new.loss:.3f}[/]", *exact)
    console.print(table)
