"""`python tests/campaign`: runs the campaign, or goes on with one that was interrupted, and writes its page.

`--groups config,weights` and `--only N` run a part, which writes no page unless --page is given.
"""

import argparse
import datetime
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / name) for name in ("", "cli", "export", "training", "guarantees")]
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402
from campaign_bases import Bases  # noqa: E402
from campaign_cases import GROUPS, cases, judge_of, prepare  # noqa: E402
from campaign_page import summary, table, write  # noqa: E402
from campaign_pool import BAD, Case, run_all  # noqa: E402
from rich.console import Console  # noqa: E402

import hasten  # noqa: E402


def fingerprint() -> str:
    """Of the sources of hasten and of the campaign: results of other sources are not gone on with."""
    files = [*Path(hasten.__file__).parent.rglob("*.py"), *HERE.glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def earlier(path: Path, mark: str) -> list[dict[str, Any]]:
    """The results of an interrupted run of the same sources."""
    if not path.exists():
        return []
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    return [json.loads(line) for line in lines] if first == mark else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("--groups", default=",".join(GROUPS), help="of the table, separated by commas")
    parser.add_argument("--only", type=int, help="the first N cases of each group")
    parser.add_argument(
        "--cases", default="", help="these alone, as the list of violations names them: config/3,job/17"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs/campaign")
    parser.add_argument("--page", action="store_true", help="write docs/campaign.md for a part too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    console, groups = Console(), asked.groups.split(",")
    planned = {group: cases(group)[: asked.only] for group in groups}
    if asked.cases:
        named = set(asked.cases.split(","))
        planned = {group: [case for case in cases(group) if case.key in named] for group in GROUPS}
    asked.out.mkdir(parents=True, exist_ok=True)
    journal, mark = asked.out / "results.jsonl", fingerprint()
    results = earlier(journal, mark)
    done = {one["key"] for one in results}
    wanted = [case for group in planned.values() for case in group if case.key not in done]
    if not wanted:  # complete: this is a new run
        results, wanted = [], [case for group in planned.values() for case in group]
    journal.write_text("".join(f"{line}\n" for line in (mark, *map(json.dumps, results))), encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="campaign-") as place:
        root = Path(place)
        (made,) = run_all([Case("bases", 0, 300.0)], lambda _: lambda seed, _: prepare(seed, root))
        if made.outcome in BAD:
            console.print(f"[bold red]the bases cannot be made: {made.detail}")
            return 1
        bases = Bases(root / "bases")
        for count, result in enumerate(run_all(wanted, lambda case: judge_of(case, bases), asked.workers), 1):
            results.append(asdict(result))
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            if result.outcome in BAD:
                console.print(
                    f"{result.key} {result.outcome}: {result.what}: {result.detail}", markup=False, soft_wrap=True
                )
            if count % 50 == 0:
                console.print(f"{count} of {len(wanted)}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    facts = {"day": datetime.date.today().isoformat(), "versions": versions}
    keys = {case.key for group in planned.values() for case in group}
    figures = summary(
        {name: count for name, (count, _) in GROUPS.items()}, [r for r in results if r["key"] in keys], facts
    )
    console.print(table(figures))
    if asked.page or (set(groups) == set(GROUPS) and asked.only is None and not asked.cases):
        write(figures)
    return 1 if figures["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
