"""The tables of docs/benchmarks.md about memory: peaks against predictions, budgets, longest rows."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.jobs import JOBS, VARIANTS
from benchmarks.tables import Result, races, table

Row = Mapping[str, Any]


def _off(row: Row) -> str:
    """By how much of the measured peak the prediction is off."""
    return f"{row['predicted_gib'] / row['peak_gib'] - 1:+.1%}"


def predictions_table(result: Result, mode: str) -> str:
    """hasten's measured peaks of a race against what was predicted of them; "" where nothing was."""
    rows, seen = [], set()
    for (job, of), groups in races(result).items():
        for row in (row for group in groups for row in group):
            told = of == mode and row["variant"] == "hasten" and "predicted_gib" in row and row.get("peak_gib")
            if told and job not in seen:
                seen.add(job)
                rows.append([JOBS[job].title, *_peaks(row), row["plan"]])
    return table(["hasten's step of", "measured GiB", "predicted", "off by", "plan"], rows) if rows else ""


def _peaks(row: Row) -> list[str]:
    return [f"{row['peak_gib']:.2f}", f"{row['predicted_gib']:.2f}", _off(row)]


def budget_table(result: Result) -> str:
    rows = []
    for row in result["budget"]:
        budget = f"{row['budget_gib']:.2f}" if row["budget_gib"] is not None else "-"
        kept = "yes" if row["ok"] else "no"
        asked = (
            '"offload"' if row["mode"] == "offload" else "no budget" if row["times"] is None else f"{row['times']:g}x"
        )
        rows.append([row["job"], asked, budget, *_peaks(row), kept, f"{row['ms']:.0f}", row["plan"]])
    head = ["job", "of what `offload` needs", "budget, GiB", "measured GiB", "predicted", "off by", "within the budget",
            "step, ms", "plan"]  # fmt: skip
    return table(head, rows)


def longest_section(result: Result) -> list[str]:
    """The rows under each cap, the longest that came through first said, and whether the peak is a line in the length."""
    points = [row for row in result["longest"] if row["cap_gib"] is not None]
    series = [row for row in result["longest"] if row["cap_gib"] is None]
    parts = []
    if points:
        parts += [_best_table(points), _points_table(points)]
    if series:
        parts += ["Every layer recomputed, its input in host memory, without a cap:", _points_table(series)]
    if "linearity" in result:
        fit = result["linearity"]
        parts.append(
            f"Least squares through these: {fit['gib_at_zero']:.2f} GiB and {fit['gib_per_1024']:.4f} GiB for every 1,024 "
            f"tokens; no peak is off that line by more than {fit['residual_gib']:.3f} GiB ({fit['residual_share']:.2%})."
        )
    return parts


def _best_table(points: Iterable[Row]) -> str:
    """The longest row under each cap that came through, and the shortest that did not."""
    points = list(points)
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in points)]
    rows = []
    for cap in sorted({row["cap_gib"] for row in points}):
        cells = [f"{cap:g} GiB"]
        for variant in variants:
            tried = [row for row in points if (row["cap_gib"], row["variant"]) == (cap, variant)]
            passed = [row for row in tried if row["ok"]]
            failed = [row for row in tried if not row["ok"]]
            said = [_length(max(passed, key=lambda row: row["length"]))] if passed else []
            said += [f"{_length(min(failed, key=lambda row: row['length']))} fails"] if failed else []
            cells.append("; ".join(said) or "-")
        rows.append(cells)
    return table(["cap", *(f"{VARIANTS[variant]}: longest row tried, tokens" for variant in variants)], rows)


def _length(row: Row) -> str:
    return f"{row['length']:,}" + (" (embedding in host memory)" if row["offload_embedding"] else "")


def _points_table(points: Iterable[Row]) -> str:
    rows = []
    for row in sorted(points, key=lambda row: (row["variant"], row["cap_gib"] or 0, row["length"])):
        cap = "-" if row["cap_gib"] is None else f"{row['cap_gib']:g}"
        predicted = "-" if row.get("predicted_gib") is None else f"{row['predicted_gib']:.2f}"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        said = row.get("plan") or "-" if row["ok"] else f"fails: {row['error'][:80]}"
        rows.append(
            [VARIANTS[row["variant"]], cap, _length(row), f"{row['peak_gib']:.2f}", f"{row['reserved_gib']:.2f}",
             predicted, seconds, said]
        )  # fmt: skip
    head = [
        "library",
        "cap, GiB",
        "tokens",
        "most allocated, GiB",
        "most reserved",
        "predicted",
        "seconds a step",
        "plan",
    ]
    return table(head, rows)
