"""Training steps of several libraries side by side on one GPU, in turns: a b c d a b c d ...

Each runs in its own process, which waits while another one steps. They load together, warm up one after another and then take
turns, so that drift of the machine affects all of them. Step n sees the same tokens from the same start everywhere: losses
are compared at every step, and figures of a row whose losses disagree are set apart.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.jobs import BEFORE, JOBS, memory_gib
from benchmarks.harness.workers import Worker, WorkerFailed, module

PARITY = 2e-3
"""Largest difference of two libraries' losses at any step (nats per token)."""
GRADIENTS = 0.5
"""Largest relative difference of two libraries' sampled gradients at the second step. bf16 matmuls in another order, through many
random layers, cause some per cent; a wrong scale or a missing part of a gradient causes more than this."""


@dataclass(frozen=True)
class Plan:
    """`warm` steps, then `rounds` turns of `untimed` + `steps` steps each. The limits are seconds."""

    warm: int = 3
    rounds: int = 3
    steps: int = 3
    untimed: int = 1
    load_limit: float = 300
    turn_limit: float = 240
    load_alone: bool = False


@dataclass
class Lane:
    """What one worker has reported so far."""

    worker: Worker
    row: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    rounds: list[list[float]] = field(default_factory=list)
    peaks: list[tuple[float, float]] = field(default_factory=list)

    def ask(self, limit: float, do: str | None, **arguments: Any) -> dict[str, Any]:
        """Returns the worker's answer (do = None: to its start), or {} with the failure recorded in the row."""
        try:
            return self.worker.ask(limit, do, **arguments) if do else self.worker.reply(limit)
        except WorkerFailed as error:
            self.row["error"] = str(error)
            return {}

    def load(self, plan: Plan) -> None:
        self.row.update(self.ask(plan.load_limit, None))

    def warm(self, plan: Plan) -> None:
        warm = self.ask(plan.turn_limit, "warm", steps=plan.warm)
        self.losses += warm.get("losses", [])
        self.row |= {"first_step_s": warm.get("first_s"), "gradients": warm.get("gradients", [])}

    def turn(self, plan: Plan) -> None:
        done = self.ask(plan.turn_limit, "run", steps=plan.steps, untimed=plan.untimed)
        if done:
            self.losses += done["losses"]
            self.rounds.append(done["seconds"])
            self.peaks.append((done["peak_gib"], done["reserved_gib"]))
            self.row |= {name: done[name] for name in ("plan", "predicted_gib") if name in done}

    def figures(self) -> dict[str, Any]:
        times = sorted(1e3 * seconds for turn in self.rounds for seconds in turn)
        peak, reserved = (max(values) for values in zip(*self.peaks, strict=True))
        return {
            "ms": statistics.median(times), "min_ms": times[0], "max_ms": times[-1], "steps": len(times),
            "round_ms": [statistics.median(turn) * 1e3 for turn in self.rounds], "peak_gib": peak,
            "reserved_gib": reserved,
        }  # fmt: skip


FIGURES = ("ms", "min_ms", "max_ms", "round_ms", "peak_gib", "reserved_gib")


def groups(job: str, mode: str, variants: Sequence[str], room_gib: float) -> list[list[str]]:
    """Splits `variants` into groups that fit into `room_gib` while one worker steps; the first variant is in every group."""
    need = {variant: memory_gib(JOBS[job], mode, variant) for variant in variants}

    def fits(group: list[str]) -> bool:
        paused = sum(need[v][0] for v in group)
        return paused + max(need[v][1] - need[v][0] for v in group) <= room_gib

    anchor, *others = variants
    found: list[list[str]] = []
    for variant in others:
        if (home := next((group for group in found if fits([*group, variant])), None)) is None:
            found.append([anchor, variant])
        else:
            home.append(variant)
    return found or [[anchor]]


def command_for(job: str, mode: str, variant: str, folder: str, before: Path | None = None) -> list[str]:
    """before: the folder from which the worker of "hasten-before" imports hasten."""
    told = {"variant": variant, "job": job, "mode": mode, "folder": folder}
    return module("harness.serve", json.dumps(told | ({"tree": str(before)} if variant == BEFORE else {})))


def race(
    group: Sequence[str], start: Callable[[str], Worker], plan: Plan, afterwards: Callable[[Lane], None] | None = None
) -> list[dict[str, Any]]:
    """Returns one row per variant of `group`, in its order: the figures, or an "error".

    start: variant -> a started worker. afterwards: called with each lane that has figures, before the workers end.
    """
    lanes: list[Lane] = []

    def alive() -> Iterator[Lane]:
        return (lane for lane in lanes if "error" not in lane.row)

    try:
        for variant in group:
            lanes.append(Lane(start(variant), {"variant": variant, "group": "+".join(group)}))
            if plan.load_alone:
                lanes[-1].load(plan)
        if not plan.load_alone:
            for lane in lanes:
                lane.load(plan)
        for lane in alive():
            lane.warm(plan)
        for _ in range(plan.rounds):
            for lane in alive():
                lane.turn(plan)
        for lane in alive():
            lane.row.update(lane.figures())
            if afterwards is not None:
                afterwards(lane)
    finally:
        for lane in lanes:
            lane.worker.end()
    beside = 0 if plan.load_alone else len(lanes) - 1
    return [{**lane.row, "losses": lane.losses, "loaded_beside": beside} for lane in lanes]


def with_parity(rows: Sequence[Mapping[str, Any]], bound: float = PARITY) -> list[dict[str, Any]]:
    """Adds "parity" to the rows of one job and mode: {"against", "worst", "step", "compared", "gradients", "ok"}. The figures of
    a row that fails move to "unchecked", where no table compares them.

    Each row is compared with transformers at every step both took; without transformers, hasten with the first other row.
    Without either, "against" is None. hasten beside "hasten-before" also gets "before" (see `_before`), and its parity
    fails if those two disagree.
    """
    sound = [row for row in rows if "error" not in row]
    stock = next((row for row in sound if row["variant"] == "transformers"), None)
    before = next((row for row in sound if row["variant"] == BEFORE), None)
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
    off = [abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=False)]
    worst = max(range(len(off)), key=lambda i: (off[i] != off[i], off[i]), default=None)
    gradients = _relative(row.get("gradients", []), other.get("gradients", []))
    close = bool(off) and all(one <= bound for one in off)  # false for NaN
    return {
        "ok": close and (gradients is None or gradients <= GRADIENTS),
        "worst": None if worst is None else off[worst], "step": worst, "compared": len(off),
        "against": other["variant"], "gradients": gradients,
    }  # fmt: skip


def _before(row: Mapping[str, Any], before: Mapping[str, Any], bound: float) -> dict[str, Any]:
    """{"ok", "worst", "gradients", "ratio": time over the time before, "rounds": that of each round's medians, "peak_gib": now less
    before}; no figures if the two disagree."""
    agreed = _agreement(row, before, bound)
    found = {name: agreed[name] for name in ("ok", "worst", "gradients")}
    if agreed["ok"]:
        pairs = zip(row["round_ms"], before["round_ms"], strict=True)
        found |= {"ratio": row["ms"] / before["ms"], "rounds": [ours / theirs for ours, theirs in pairs]}
        found["peak_gib"] = row["peak_gib"] - before["peak_gib"]
    return found


def _relative(mine: Sequence[float], theirs: Sequence[float]) -> float | None:
    """|mine - theirs| / |theirs|, or None without samples of the same gradients."""
    if not mine or len(mine) != len(theirs):
        return None
    return math.dist(mine, theirs) / math.hypot(*theirs)


def line_of(row: Mapping[str, Any]) -> str:
    """One printed line; figures only for a row whose losses agree."""
    name = f"{row['job']} {row['mode']} {row['variant']}"
    if "error" in row:
        return f"{name:36s} ERROR {row['error'].splitlines()[0]}"
    parity = row.get("parity", {})
    if "ms" not in row:
        return f"{name:36s} PARITY FAILED: {parity['worst']:.2e} from {parity['against']} at step {parity['step']}"
    line = (
        f"{name:36s} {row['ms']:7.1f} ms ({row['min_ms']:.1f} to {row['max_ms']:.1f})  {row['peak_gib']:5.1f} GiB  "
        f"first {row['first_step_s']:.1f} s  load {row['load_s']:.1f} s  "
        f"loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}"
    )
    if parity.get("against"):
        line += f"  within {parity['worst']:.1e} of {parity['against']}"
    if before := row.get("before"):
        gradients = "-" if before["gradients"] is None else f"{before['gradients']:.1e}"
        line += (
            f"\n{'':36s} {before['ratio']:.4f} of the time before ({min(before['rounds']):.4f} to "
            f"{max(before['rounds']):.4f} by round), {before['peak_gib']:+.2f} GiB, losses within {before['worst']:.1e}, "
            f"gradients {gradients}"
        )
    return line
