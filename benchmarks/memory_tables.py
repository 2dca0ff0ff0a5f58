"""The tables of docs/benchmarks.md about memory: peaks against predictions, budgets, longest sequences."""

from collections.abc import Iterable, Sequence

from benchmarks.harness.jobs import JOBS, VARIANTS
from benchmarks.tables import Columns, Result, Row, all_rows, table

PEAKS: Columns = {
    "measured GiB": "{peak_gib:.2f}", "predicted": "{predicted_gib:.2f}",
    "off by": lambda row: f"{row['predicted_gib'] / row['peak_gib'] - 1:+.1%}",
}  # fmt: skip


def predictions_table(result: Result, mode: str) -> str:
    """hasten's measured peaks of a race against the predicted ones; "" without predictions."""
    found: dict[str, Row] = {}
    for row in all_rows(result):
        if (row["mode"], row["variant"]) == (mode, "hasten") and "predicted_gib" in row and row.get("peak_gib"):
            found.setdefault(row["job"], row)
    columns = {"hasten's step of": lambda row: JOBS[row["job"]].title, **PEAKS, "plan": "{plan}"}
    return table(columns, found.values()) if found else ""


def budget_table(result: Result) -> str:
    def asked(row: Row) -> str:
        if row["mode"] == "offload":
            return '"offload"'
        return "no budget" if row["times"] is None else f"{row['times']:g}x"

    columns = {
        "job": "{job}", "times what `offload` needs": asked, "budget, GiB": "{budget_gib:.2f}", **PEAKS,
        "within the budget": lambda row: "yes" if row["ok"] else "no", "step, ms": "{ms:.0f}", "plan": "{plan}",
    }  # fmt: skip
    return table(columns, result["budget"])


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

    def cell(cap: float, variant: str) -> str:
        tried = sorted(
            (row for row in points if (row["cap_gib"], row["variant"]) == (cap, variant)), key=lambda row: row["length"]
        )
        said = [_length(row) for row in tried if row["ok"]][-1:]
        return "; ".join(said + [f"{_length(row)} fails" for row in tried if not row["ok"]][:1]) or "-"

    ran = {row["variant"] for row in points}
    longest = {
        f"{name}: longest sequence tried, tokens": lambda cap, variant=variant: cell(cap, variant)
        for variant, name in VARIANTS.items() if variant in ran
    }  # fmt: skip
    return table({"cap": lambda cap: f"{cap:g} GiB", **longest}, sorted({row["cap_gib"] for row in points}))


def _points_table(points: Iterable[Row]) -> str:
    columns: Columns = {
        "library": lambda row: VARIANTS[row["variant"]], "cap, GiB": "{cap_gib:g}", "tokens": _length,
        "most allocated, GiB": "{peak_gib:.2f}", "most reserved": "{reserved_gib:.2f}", "predicted": "{predicted_gib:.2f}",
        "seconds a step": "{seconds:.1f}",
        "plan": lambda row: row.get("plan") or "-" if row["ok"] else f"fails: {row['error'][:80]}",
    }  # fmt: skip
    ordered = sorted(points, key=lambda row: (row["variant"], row["cap_gib"] or 0, row["length"]))
    return table(columns, ({"predicted_gib": None, **row} for row in ordered))
