"""The campaign's results as a table in the terminal, and as docs/campaign.md and docs/campaign.json."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from campaign_pool import BAD
from rich.table import Table

ROOT = Path(__file__).parents[2]
PAGE, FIGURES = ROOT / "docs/campaign.md", ROOT / "docs/campaign.json"
HEAD = """# Campaign

`make campaign` kills training runs, merges and exports (SIGKILL, 200 times), changes checkpoints, configs, tokenizers, adapters and job
files (1,000 times), and trains for 2,000 steps. Seeds are fixed. Each case has a process and a time limit of its own. A changed file must
be refused with an error of hasten's own, or load as transformers loads it, or show the difference in the report; a killed write must
leave the old folder or the new one whole, and nothing else that loads; a killed run must resume to the same bits. This page is generated
by the campaign; the code is in `tests/campaign/`.

"""
OUTCOMES = """
Outcomes that are right: *refused* with a typed error; *no effect* on logits, text, token ids or settings; *as stock*: what transformers
makes of the same files; *reported*: a difference that the report names; *whole*, *resumed*, *flat*.
"""


def summary(cases: Mapping[str, int], results: list[Mapping[str, Any]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a run. cases: of each group. facts: versions and the like."""
    groups = {}
    for group, planned in cases.items():
        mine = [one for one in results if one["key"].rpartition("/")[0] == group]
        counted = Counter(one["outcome"] for one in mine)
        groups[group] = {"planned": planned, "run": len(mine), "outcomes": dict(sorted(counted.items()))}
    bad = [one for one in results if one["outcome"] in BAD]
    listed = [{name: one[name] for name in ("key", "outcome", "what", "detail")} for one in bad]
    notes = [one["detail"] for one in results if one["outcome"] == "flat"]
    return {
        "facts": dict(facts),
        "groups": groups,
        "violations": sorted(listed, key=lambda v: v["key"]),
        "notes": notes,
    }


def counts(group: Mapping[str, Any]) -> list[str]:
    """Cells of a line of the table."""
    outcomes = group["outcomes"]
    right = ", ".join(f"{count} {name}" for name, count in outcomes.items() if name not in BAD)
    return [str(group["run"]), right or "-", *(str(outcomes.get(name, 0)) for name in BAD)]


def render(figures: Mapping[str, Any]) -> str:
    """The page."""
    groups = figures["groups"]
    columns = ["cases", "run", "right", *(f"{name}s" for name in BAD)]
    columns[-1] = "crashes"
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|" + "---|" * len(BAD)]
    lines += [f"| {name} | {' | '.join(counts(group))} |" for name, group in groups.items()]
    total = [str(sum(g["outcomes"].get(name, 0) for g in groups.values())) for name in BAD]
    run, planned = (sum(g[name] for g in groups.values()) for name in ("run", "planned"))
    lines.append(f"| **all** | {run} | | {' | '.join(f'**{count}**' for count in total)} |")
    told = [f"Run of {figures['facts']['day']} with {figures['facts']['versions']}."]
    if run < planned:
        told.append(f"**Incomplete**: {run} of {planned} cases were run.")
    told += [f"The soak: {note}." for note in figures["notes"]]
    found = [
        f"- `{one['key']}` {one['outcome']}: {_plain(one['what'])}: {_plain(one['detail'])}"
        for one in figures["violations"]
    ]
    listed = ["\n## Violations\n", *found] if found else []
    return HEAD + "\n".join([*lines, OUTCOMES, "\n".join(told), *listed]) + "\n"


def _plain(text: str) -> str:
    """Without the line of source, which moves."""
    line = " ".join(re.sub(r"\([^() ]+\.py:\d+\)", "", text).replace("`", "'").split())
    return f"`{line[:160]}`"


def table(figures: Mapping[str, Any]) -> Table:
    """For the terminal."""
    shown = Table("cases", "run", "right", *BAD, title="campaign")
    for name, group in figures["groups"].items():
        cells = counts(group)
        bad = [f"[bold red]{cell}" if cell != "0" else cell for cell in cells[2:]]
        shown.add_row(name, f"{cells[0]}/{group['planned']}", cells[1], *bad)
    return shown


def write(figures: Mapping[str, Any]) -> None:
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(figures), encoding="utf-8")
