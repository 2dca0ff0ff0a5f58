"""The tables of docs/benchmarks.md and of the README, from results. Every figure in them comes from the JSON."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any

from benchmarks.harness.jobs import BEFORE, JOBS, MODES, PACKAGE_OF, RATIOS, TARGETS, VARIANTS
from benchmarks.harness.race import GRADIENTS
from benchmarks.limits import floor_ms

Result = Mapping[str, Any]
Row = Mapping[str, Any]
Columns = Mapping[str, str | Callable[[Any], str]]
"""Head -> a cell: a format string of the row's keys (of an object's attributes: {0.name}), or a function of the row."""


class _Dashed(Formatter):
    """Formats a missing figure as "-"."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return "-" if value is None else super().format_field(value, format_spec)


def cells(columns: Columns, row: Any) -> list[str]:
    named = row if isinstance(row, Mapping) else {}
    return [_Dashed().vformat(one, (row,), named) if isinstance(one, str) else one(row) for one in columns.values()]


def table(columns: Columns, rows: Iterable[Any], rule: str = " --- ") -> str:
    """A Markdown table. rule: below each head."""
    head, *lines = (f"| {' | '.join(line)} |" for line in [list(columns), *(cells(columns, row) for row in rows)])
    return "\n".join([head, f"|{'|'.join([rule] * len(columns))}|", *lines])


# Training steps


def races(result: Result) -> dict[tuple[str, str], list[list[Row]]]:
    """{(job, mode): its groups of rows, the largest group first}, in the order of JOBS and MODES."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for key in ((job, mode) for job in JOBS for mode in MODES):
        for row in result.get("train", []):
            if (row["job"], row["mode"]) == key:
                found.setdefault(key, {}).setdefault(row["group"], []).append(row)
    return {key: sorted(groups.values(), key=len, reverse=True) for key, groups in found.items()}


def all_rows(result: Result) -> Iterator[Row]:
    """Every row of every race, in the order of `races`."""
    return (row for groups in races(result).values() for group in groups for row in group)


def _of(variant: str, rows: Iterable[Row]) -> Row:
    return next((row for row in rows if row["variant"] == variant), {})


def _figure(row: Row) -> str:
    if "error" in row:
        return f"fails: {row['error'].splitlines()[0][:60]}"
    if "ms" in row:
        return f"{row['ms']:.0f} ms, {row['peak_gib']:.1f} GiB"
    parity = row["parity"]
    measured = _figure(row["unchecked"]) + "; " if row.get("unchecked") else ""
    if (parity.get("gradients") or 0) > GRADIENTS:
        return f"{measured}gradients {parity['gradients']:.1%} from {VARIANTS[parity['against']]}"
    return f"{measured}losses {parity['worst']:.1e} from {VARIANTS[parity['against']]} at step {parity['step']}"


def _beside(peer: str, groups: Iterable[Sequence[Row]]) -> str:
    """The peer's figure and its time over hasten's in the same race."""
    for group in groups:
        theirs, ours = _of(peer, group), _of("hasten", group)
        if theirs:
            ratio = f" ({theirs['ms'] / ours['ms']:.2f}x)" if "ms" in theirs and "ms" in ours else ""
            return _figure(theirs) + ratio
    return "-"


def _parity(rows: Iterable[Row]) -> str:
    known = [row["parity"] for row in rows if row["variant"] == "hasten" and row.get("parity", {}).get("against")]
    if not known:
        return "no other library"
    worst = max(known, key=lambda one: one["worst"])
    gradients = worst.get("gradients")
    said = "" if gradients is None else f", gradients by {gradients:.1%}"
    return f"{worst['worst']:.1e}{said} ({VARIANTS[worst['against']]})"


def _target(key: tuple[str, str]) -> str:
    if key in RATIOS:
        return f"Unsloth {RATIOS[key]:g}x"
    ms, gib = TARGETS.get(key, (None, None))
    return "-" if ms is None else f"{ms:.0f} ms" + (f", {gib:g} GiB" if gib is not None else "")


def _floor(ceilings: Mapping[str, float], job: str, mode: str) -> str:
    if not {"matmul", "copy", "attention_forward", "attention_backward"} <= set(ceilings):
        return "-"
    return f"{floor_ms(JOBS[job], mode, ceilings)['total']:.0f} ms"


def _alone(ours: Row) -> str:
    """The step's matmuls and attention alone, and their share of hasten's whole step."""
    if not ours.get("alone_ms"):
        return "-"
    share = f" ({ours['alone_ms'] / ours['ms']:.0%} of hasten's step)" if "ms" in ours else ""
    return f"{ours['alone_ms']:.0f} ms{share}"


def training_table(result: Result, mode: str) -> str:
    """One line per job: hasten, each library that ran, target and floor. A ratio is over hasten in the same race."""
    present = {job: groups for (job, of), groups in races(result).items() if of == mode}
    every = {job: [row for group in groups for row in group] for job, groups in present.items()}
    ran = {row["variant"] for rows in every.values() for row in rows}
    ours = {job: _of("hasten", rows) for job, rows in every.items()}
    columns: dict[str, str | Callable[[str], str]] = {
        "a step of": lambda job: JOBS[job].title, "hasten": lambda job: _figure(ours[job]) if ours[job] else "-",
        **{VARIANTS[peer]: lambda job, peer=peer: _beside(peer, present[job])
           for peer in VARIANTS if peer in ran - {"hasten"}},
        "target": lambda job: _target((job, mode)), "floor": lambda job: _floor(result.get("ceilings", {}), job, mode),
        "matmuls alone": lambda job: _alone(ours[job]), "losses differ by at most": lambda job: _parity(every[job]),
    }  # fmt: skip
    return table(columns, present)


def load_table(result: Result) -> str:
    columns: Columns = {
        "job": "{job}, {mode}", "library": lambda row: VARIANTS[row["variant"]], "seconds to load": "{load_s:.1f}",
        "first step, seconds": "{first_step_s:.1f}",
        "loaded": lambda row: f"beside {row['loaded_beside']} others" if row["loaded_beside"] else "alone",
    }  # fmt: skip
    return table(columns, (row for row in all_rows(result) if row.get("load_s") is not None and "error" not in row))


def profile_table(result: Result) -> str:
    found: dict[str, Row] = {}
    for row in all_rows(result):
        if "profile" in row:
            found.setdefault(f"{row['job']}, {row['mode']}", row["profile"])

    def kinds(row: Row) -> str:
        return ", ".join(f"{kind} {one['ms']:.1f}" for kind, one in row["kinds"].items() if one["ms"] >= 0.5)

    columns: Columns = {
        "job": "{job}", "step, ms": "{wall_ms:.0f}", "on the device in one profiled step, ms": kinds,
        "the rest, ms": "{idle_ms:.1f}",
    }  # fmt: skip
    return table(columns, ({"job": job, **profiled} for job, profiled in found.items())) if found else ""


def costs_text(result: Result) -> str:
    costs = dict(result["fixed_costs"])
    imports, lines = costs.pop("import", {}), []
    if imports:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in imports.items())
        lines.append(f"Seconds of import, each beyond the ones before it: {parts}.\n")
    rows = [{"job": job, **cost["host_waits"], **one} for job, cost in costs.items() for one in cost["lengths"]]
    columns: Columns = {
        "job": "{job}", "host waits a step": "{count}", "then at length": "{length}",
        "kernels compiled": lambda row: str(len(row["compiled"])), "first step, ms": "{first_ms:.0f}",
        "second, ms": "{second_ms:.0f}",
    }  # fmt: skip
    return "\n".join([*lines, *([table(columns, rows)] if rows else [])])


# Ops, packing, curves, sanitizers


def ops_table(result: Result) -> str:
    """Each op's rate and its share of the ceiling that bounds it: copy or matmul."""
    ceilings, rows = result["ceilings"], []
    for row in result["ops"]:
        moved = {"copy": (row["bytes"], "TB/s"), "matmul": (row["flops"], "TFLOP/s")}
        bound = max((name for name in moved if name in ceilings), key=lambda name: moved[name][0] / ceilings[name])
        amount, unit = moved[bound]
        share = amount / ceilings[bound] * 1e3 / row["ms"]
        rows.append({**row, "rate": amount / row["ms"] / 1e9, "unit": unit, "bound": bound, "share": share})
    return table({"op": "{op}", "ms": "{ms:.3f}", "reached": "{rate:.2f} {unit}", "bound by": "{bound}",
                  "of that ceiling": "{share:.0%}"}, rows)  # fmt: skip


def ceilings_line(result: Result) -> str:
    ceilings = result["ceilings"]
    words = {
        "matmul": "bf16 matmul of 8192^3 {:.0f} TFLOP/s", "copy": "copy {:.2f} TB/s",
        "attention_forward": "causal attention forward {:.0f}", "attention_backward": "and backward {:.0f} TFLOP/s",
    }  # fmt: skip
    return ", ".join(text.format(ceilings[name] / 1e12) for name, text in words.items() if name in ceilings)


def packing_section(result: Result) -> list[str]:
    """What the sequences are like, and the ways to train on them."""
    from benchmarks.packing import WAYS

    packing = result["packing"]
    said = (
        "{shape} shape, LoRA r=16, nothing recomputed; {rows} sequences a step, the same in every way. Lengths are log-normal with a "
        "median of {median:g} and sigma of {sigma:g}, at most {longest} tokens: mean {mean:.0f}, 10% below {p10:.0f}, 10% above "
        "{p90:.0f}, 1% above {p99:.0f}, longest {max:.0f}. Padding does not count as tokens."
    ).format(**packing["lengths"] | packing["setting"])
    padded = next((row["tokens_per_s"] for row in packing["ways"] if row["way"] == "padded" and "ms" in row), None)

    def figure(form: str, name: str, over: float | None = 1.0) -> Callable[[Row], str]:
        return lambda row: form.format(row[name] / over) if "ms" in row and over is not None else "-"

    columns: Columns = {
        "batches": lambda row: WAYS[row["way"]][0],
        "padding": lambda row: f"{row['computed_tokens'] / packing['real_tokens'] - 1:.1%}",
        "real tokens/s": figure("{:.1f}k", "tokens_per_s", 1e3), "of padded": figure("{:.2f}x", "tokens_per_s", padded),
        "peak GiB": figure("{:.1f}", "peak_gib"), "loss differs from padded by": "{loss_off:.1e}",
    }  # fmt: skip
    return [said, table(columns, packing["ways"])]


def curves_table(result: Result) -> str:
    from benchmarks.curves import STAGES

    columns: Columns = {
        "200 steps of": "{title}", "steps within stock's range": "{inside:.0%}", "final loss, stock": "{final_stock:.4f}",
        "hasten": "{final_hasten:.4f}", "difference in standard deviations of stock's seeds": "{sigmas:+.2f}",
        "largest difference of one seed": "{paired:.4f}",
    }  # fmt: skip
    return table(columns, ({"title": title, **result["curves"][stage]} for stage, title in STAGES.items()))


def sanitize_table(result: Result) -> str:
    columns: Columns = {
        "tool": "{tool}", "kernels": "{calls}", "clean": lambda row: "yes" if row["clean"] else "no",
        "summary": "{verdict}",
    }  # fmt: skip
    return table(columns, result["sanitize"])


def readme_row(result: Result, job: str, mode: str) -> list[str]:
    """The README's cells about one job: what, hardware, result, reproduce. Raises LookupError without a figure of hasten's."""
    groups = races(result).get((job, mode), [])
    group = next((g for g in groups if "ms" in _of("hasten", g)), None)
    if group is None:
        raise LookupError(f"no figure of hasten's for {job}, {mode}")
    form = "{ms:.0f} ms and {peak_gib:.1f} GiB"
    said = f"{form} a step".format(**_of("hasten", group))
    peers = [row for row in group if row["variant"] not in ("hasten", BEFORE) and "ms" in row]
    if peers:
        best = min(peers, key=lambda row: row["ms"])
        name = f"{VARIANTS[best['variant']]} {result['versions'][PACKAGE_OF[best['variant']]]}"
        said += f"; {name} in the same run {form.format(**best)}"
    variants = ",".join(row["variant"] for row in group)
    command = f"`python -m benchmarks.gpu --out DIR --only train --jobs {job} --variants {variants} --modes {mode}`"
    return [f"{JOBS[job].title}, {MODES[mode]}", f"one {result['versions']['gpu'].split()[-1]}", said, command]
