"""Training steps of several libraries side by side on one GPU, in turns: a b c d a b c d ...

Each runs in a process of its own that waits while another one steps. They load together, warm up one after another, and then
take turns, so that whatever the machine does over the minutes happens to all of them. Step n sees the same tokens from the
same start everywhere: losses are compared at every step, and a figure whose losses do not agree is not given.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.jobs import BEFORE, JOBS, memory_gib
from benchmarks.workers import Worker, WorkerFailed

PARITY = 2e-3
"""Largest difference of two libraries' losses at any step (nats per token)."""
GRADIENTS = 0.5
"""Largest difference of two libraries' gradients over their size, on a sample at the second step. Products in bf16, in another
order, through many random layers make some per cent; a wrong scale or a missing part of a gradient makes more than this."""


@dataclass(frozen=True)
class Plan:
    """warm steps, then `rounds` turns of `untimed` + `steps` steps each. The limits are seconds."""

    warm: int = 3
    rounds: int = 3
    steps: int = 3
    untimed: int = 1
    load_limit: float = 300
    turn_limit: float = 240
    load_alone: bool = False


@dataclass
class Lane:
    """What one worker has shown so far."""

    worker: Worker
    row: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    peaks: list[tuple[float, float]] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return "error" not in self.row

    def attempt(self, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The action's answer, or {} with the failure written into the row."""
        try:
            return action()
        except WorkerFailed as error:
            self.row["error"] = str(error)
            return {}


def groups(job: str, mode: str, variants: Sequence[str], room_gib: float) -> list[list[str]]:
    """Splits `variants` so that each group fits into `room_gib` with one worker stepping; the first is in every group."""
    need = {variant: memory_gib(JOBS[job], mode, variant) for variant in variants}

    def fits(group: list[str]) -> bool:
        paused = sum(need[v][0] for v in group)
        return paused + max(need[v][1] - need[v][0] for v in group) <= room_gib

    anchor, *others = variants
    found: list[list[str]] = []
    for variant in others:
        home = next((group for group in found if fits([*group, variant])), None)
        if home is None:
            found.append([anchor, variant])
        else:
            home.append(variant)
    return found or [[anchor]]


def command_for(job: str, mode: str, variant: str, folder: str, before: Path | None = None) -> list[str]:
    """before: the folder from which the worker of "hasten-before" imports hasten."""
    command = [sys.executable, "-m", "benchmarks.train_step", variant, job, mode, folder, "--serve"]
    return [*command, "--tree", str(before)] if variant == BEFORE else command


def race(
    group: Sequence[str],
    start: Callable[[str], Worker],
    plan: Plan,
    afterwards: Callable[[Lane], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per variant of `group`, in its order: the figures, or an "error".

    start: variant -> a started worker. afterwards: called with each lane that came through, before the workers end.
    """
    lanes: list[Lane] = []
    try:
        for variant in group:
            lanes.append(Lane(start(variant), {"variant": variant, "group": "+".join(group)}))
            if plan.load_alone:
                _loaded(lanes[-1], plan)
        if not plan.load_alone:
            for lane in lanes:
                _loaded(lane, plan)
        for lane in _alive(lanes):
            warm = lane.attempt(lambda: lane.worker.ask(plan.turn_limit, "warm", steps=plan.warm))  # noqa: B023
            lane.losses += warm.get("losses", [])
            lane.row["first_step_s"] = warm.get("first_s")
            lane.row["gradients"] = warm.get("gradients", [])
        for _ in range(plan.rounds):
            for lane in _alive(lanes):
                _turn(lane, plan)
        for lane in _alive(lanes):
            lane.row.update(_figures(lane))
            if afterwards is not None:
                afterwards(lane)
    finally:
        for lane in lanes:
            lane.worker.end()
    beside = 0 if plan.load_alone else len(lanes) - 1
    return [{**lane.row, "losses": lane.losses, "loaded_beside": beside} for lane in lanes]


def _alive(lanes: list[Lane]) -> Iterator[Lane]:
    return (lane for lane in lanes if lane.alive)


def _loaded(lane: Lane, plan: Plan) -> None:
    lane.row.update(lane.attempt(lambda: lane.worker.reply(plan.load_limit)))


def _turn(lane: Lane, plan: Plan) -> None:
    done = lane.attempt(lambda: lane.worker.ask(plan.turn_limit, "run", steps=plan.steps, untimed=plan.untimed))
    if done:
        lane.losses += done["losses"]
        lane.seconds += done["seconds"]
        lane.rounds.append(statistics.median(done["seconds"]) * 1e3)
        lane.peaks.append((done["peak_gib"], done["reserved_gib"]))
        lane.row.update({name: done[name] for name in PREDICTIONS if name in done})


def _figures(lane: Lane) -> dict[str, Any]:
    times = sorted(lane.seconds)
    return {
        "ms": statistics.median(times) * 1e3,
        "min_ms": times[0] * 1e3,
        "max_ms": times[-1] * 1e3,
        "steps": len(times),
        "round_ms": lane.rounds,
        "peak_gib": max(peak for peak, _ in lane.peaks),
        "reserved_gib": max(reserved for _, reserved in lane.peaks),
    }


PREDICTIONS = ("plan", "predicted_gib")
FIGURES = ("ms", "min_ms", "max_ms", "round_ms", "peak_gib", "reserved_gib")


def with_parity(rows: Sequence[Mapping[str, Any]], bound: float = PARITY) -> list[dict[str, Any]]:
    """The rows of one job and mode with what their losses say: {"against", "worst", "step", "ok"}; a failed row's figures
    move to "unchecked", where no table takes them for a comparison.

    All are compared with transformers, or where it did not come through, hasten with the first peer that did. A row alone has
    "against" None. Every step is compared that both have taken. hasten beside "hasten-before" also gets "before", see
    `_before`; its parity fails where the two disagree.
    """
    sound = [row for row in rows if "error" not in row]
    stock = next((row for row in sound if row["variant"] == "transformers"), None)
    checked = []
    for given in rows:
        row = dict(given)
        checked.append(row)
        if "error" in row or given is stock:
            continue
        other = stock
        if stock is None and row["variant"] == "hasten":
            other = next((peer for peer in sound if peer["variant"] != "hasten"), None)
        if other is None or row["variant"] == other["variant"]:
            row["parity"] = {"against": None}
            continue
        row["parity"] = _agreement(row, other, bound)
        before = next((peer for peer in sound if peer["variant"] == BEFORE), None)
        if row["variant"] == "hasten" and before is not None:
            row["before"] = _before(row, before, bound)
            if row["parity"]["ok"] and not row["before"]["ok"]:
                row["parity"] = _agreement(row, before, bound)
        if not row["parity"]["ok"]:
            row["unchecked"] = {name: row.pop(name) for name in FIGURES if name in row}
    for row in checked:
        row.pop("gradients", None)
    return checked


def _agreement(row: Mapping[str, Any], other: Mapping[str, Any], bound: float) -> dict[str, Any]:
    found = _compare(row["losses"], other["losses"], bound) | {"against": other["variant"]}
    found["gradients"] = _apart(row.get("gradients", []), other.get("gradients", []))
    found["ok"] &= found["gradients"] is None or found["gradients"] <= GRADIENTS
    return found


def _before(row: Mapping[str, Any], before: Mapping[str, Any], bound: float) -> dict[str, Any]:
    """{"ok", "worst", "gradients", "ratio": time over time before, "rounds": the same of each round's medians, "peak_gib": more}.

    Without figures where the two disagree.
    """
    agreed = _agreement(row, before, bound)
    found = {name: agreed[name] for name in ("ok", "worst", "gradients")}
    if agreed["ok"]:
        pairs = zip(row["round_ms"], before["round_ms"], strict=True)
        found |= {"ratio": row["ms"] / before["ms"], "rounds": [ours / theirs for ours, theirs in pairs]}
        found["peak_gib"] = row["peak_gib"] - before["peak_gib"]
    return found


def _apart(mine: Sequence[float], theirs: Sequence[float]) -> float | None:
    """|mine - theirs| / |theirs|, or None without samples of the same gradients."""
    if not mine or len(mine) != len(theirs):
        return None
    size = math.sqrt(sum(b * b for b in theirs))
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True))) / size


def _compare(mine: Sequence[float], theirs: Sequence[float], bound: float) -> dict[str, Any]:
    differences = [abs(a - b) for a, b in zip(mine, theirs, strict=False)]
    sound = bool(differences) and all(difference <= bound for difference in differences)  # NaN is not sound
    worst = max(range(len(differences)), key=lambda i: (differences[i] != differences[i], differences[i]), default=None)
    return {
        "ok": sound,
        "worst": None if worst is None else differences[worst],
        "step": worst,
        "compared": len(differences),
    }
