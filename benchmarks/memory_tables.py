"""The tables of docs/benchmarks.md about memory: peaks against predictions, budgets, longest sequences."""

from collections.abc import Iterable, Sequence

from benchmarks.harness.jobs import JOBS, VARIANTS
from benchmarks.tables import Result, Row, all_rows, or_dash, table


def _peaks(row: Row) -> list[str]:
    return [
        f"{row['peak_gib']:.2f}",
        f"{row['predicted_gib']:.2f}",
        f"{row['predicted_gib'] / row['peak_gib'] - 1:+.1%}",
    ]


def predictions_table(result: Result, mode: str) -> str:
    """hasten's measured peaks of a race against the predicted ones; "" without predictions."""
    found: dict[str, Row] = {}
    for job, of, row in all_rows(result):
        if of == mode and row["variant"] == "hasten" and "predicted_gib" in row and row.get("peak_gib"):
            found.setdefault(job, row)
    rows = [[JOBS[job].title, *_peaks(row), row["plan"]] for job, row in found.items()]
    return table(["hasten's step of", "measured GiB", "predicted", "off by", "plan"], rows) if rows else ""


def budget_table(result: Result) -> str:
    rows = []
    for row in result["budget"]:
        asked = "no budget" if row["times"] is None else f"{row['times']:g}x"
        asked = '"offload"' if row["mode"] == "offload" else asked
        rows.append(
            [row["job"], asked, or_dash(row["budget_gib"], ".2f"), *_peaks(row), "yes" if row["ok"] else "no",
             f"{row['ms']:.0f}", row["plan"]]
        )  # fmt: skip
    head = ["job", "times what `offload` needs", "budget, GiB", "measured GiB", "predicted", "off by", "within the budget",
            "step, ms", "plan"]  # fmt: skip
    return table(head, rows)


def longest_section(result: Result) -> list[str]:
    """The sequences under each cap, the longest that fit first, and whether the peak is linear in the length."""
    points = [row for row in result["longest"] if row["cap_gib"] is not None]
    series = [row for row in result["longest"] if row["cap_gib"] is None]
    parts = [_best_table(points), _points_table(points)] if points else []
    if series:
        parts += ["Every layer recomputed, its input offloaded to CPU memory, without a cap:", _points_table(series)]
    if "linearity" in result:
        fit = result["linearity"]
        parts.append(
            f"Least squares through these: {fit['gib_at_zero']:.2f} GiB and {fit['gib_per_1024']:.4f} GiB for every 1,024 "
            f"tokens; no peak is off that line by more than {fit['residual_gib']:.3f} GiB ({fit['residual_share']:.2%})."
        )
    return parts


def _length(row: Row) -> str:
    return f"{row['length']:,}" + (" (embedding in CPU memory)" if row["offload_embedding"] else "")


def _best_table(points: Sequence[Row]) -> str:
    """The longest sequence that fit under each cap, and the shortest that did not."""
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in points)]

    def cell(cap: float, variant: str) -> str:
        tried = sorted(
            (row for row in points if (row["cap_gib"], row["variant"]) == (cap, variant)), key=lambda row: row["length"]
        )
        said = [_length(row) for row in tried if row["ok"]][-1:]
        return "; ".join(said + [f"{_length(row)} fails" for row in tried if not row["ok"]][:1]) or "-"

    caps = sorted({row["cap_gib"] for row in points})
    rows = [[f"{cap:g} GiB", *(cell(cap, variant) for variant in variants)] for cap in caps]
    return table(["cap", *(f"{VARIANTS[variant]}: longest sequence tried, tokens" for variant in variants)], rows)


def _points_table(points: Iterable[Row]) -> str:
    rows = [
        [VARIANTS[row["variant"]], or_dash(row["cap_gib"], "g"), _length(row), f"{row['peak_gib']:.2f}",
         f"{row['reserved_gib']:.2f}", or_dash(row.get("predicted_gib"), ".2f"), or_dash(row["seconds"], ".1f"),
         row.get("plan") or "-" if row["ok"] else f"fails: {row['error'][:80]}"]
        for row in sorted(points, key=lambda row: (row["variant"], row["cap_gib"] or 0, row["length"]))
    ]  # fmt: skip
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
