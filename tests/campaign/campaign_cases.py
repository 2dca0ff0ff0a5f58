"""All cases of the campaign, and the judge of each."""

from pathlib import Path

import campaign_bases
import campaign_files
import campaign_kills
import campaign_soak
import torch
from campaign_bases import Bases
from campaign_pool import Case, Judge

GROUPS: dict[str, tuple[int, float]] = {
    "config": (270, 40.0),
    "weights": (250, 40.0),
    "tokenizer": (170, 40.0),
    "adapter": (180, 40.0),
    "job": (130, 60.0),
    "kill: merge": (60, 60.0),
    "kill: export 4-bit": (30, 60.0),
    "kill: export adapter": (30, 60.0),
    "kill: training": (80, 120.0),
    "soak": (1, 900.0),
}
"""Group -> cases, and the time limit of one in seconds: some twenty times what it takes."""
JUDGES = {
    "config": campaign_files.judge_config,
    "weights": campaign_files.judge_weights,
    "tokenizer": campaign_files.judge_tokenizer,
    "adapter": campaign_files.judge_adapter,
    "job": campaign_files.judge_job,
    "kill: training": campaign_kills.judge_training,
    "soak": campaign_soak.judge_soak,
}


def cases(group: str, first: int = 0) -> list[Case]:
    count, seconds = GROUPS[group]
    return [Case(group, seed, seconds) for seed in range(first, first + count)]


def judge_of(case: Case, bases: Bases) -> Judge:
    """The function that carries a case out."""
    if case.group in JUDGES:
        judge = JUDGES[case.group]
        return lambda seed, scratch: judge(bases, seed, scratch)
    export = case.group.removeprefix("kill: ")
    return lambda seed, scratch: campaign_kills.judge_export(bases, export, seed, scratch)


def prepare(seed: int, root: Path) -> tuple[str, str, str]:
    """A case of its own, since it trains: writes the bases, and the adapter of the run that is not killed."""
    bases = campaign_bases.make(root / "bases")
    campaign_soak.make(bases.root)
    campaign_kills.train(campaign_kills.job_in(root / "whole", bases))
    torch.save(campaign_kills.adapter(root / "whole"), bases.root / "trained.pt")
    return "no effect", "", ""
