"""What the demo shows of the held-out questions: answers side by side, and the figures."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hasten.demo.corpus import Corpus, Question
from hasten.demo.evaluate import Score

SETS = {
    "reworded": "facts that were taught, in a wording that was not",
    "untaught": "facts that were never taught (the base has only read their documentation)",
}
SHOWN = 4


def shown(corpus: Corpus, scores: dict[str, Score]) -> list[tuple[Question, str]]:
    """Some questions of each set, with the answers given."""
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
        table.add_row("asked", f"[cyan]{escape(question.question)}[/]")
        table.add_row("documented", escape(question.answer))
        table.add_row("before", f"[red]{escape(old) or '(nothing)'}[/]")
        table.add_row("after", f"[{colour}]{escape(new) or '(nothing)'}[/]", end_section=True)
    console.print(table)


def show_figures(console: Console, before: dict[str, Score], after: dict[str, Score]) -> None:
    table = Table("held out", "loss before", "loss after", "to the letter before", "after")
    for name in SETS:
        old, new = before[name], after[name]
        exact = [f"{score.exact} of {score.total}" for score in (old, new)]
        table.add_row(name, f"{old.loss:.3f}", f"[bold]{new.loss:.3f}[/]", *exact)
    console.print(table)
