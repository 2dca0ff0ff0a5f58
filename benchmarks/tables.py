"""The tables of docs/benchmarks.md and of the README, from results. Every figure in them comes from the JSON."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness.jobs import BEFORE, JOBS, MODES, PACKAGE_OF, RATIOS, TARGETS, VARIANTS
from benchmarks.harness.race import GRADIENTS
from benchmarks.limits import floor_ms

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# Training steps


def races(result: Result) -> dict[tuple[str, str], list[list[Row]]]:
    """{(job, mode): its groups of rows, the largest group first}, in the order of JOBS and MODES."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for key in ((job, mode) for job in JOBS for mode in MODES):
        for row in result.get("train", []):
            if (row["job"], row["mode"]) == key:
                found.setdefault(key, {}).setdefault(row["group"], []).append(row)
    return {key: sorted(groups.values(), key=len, reverse=True) for key, groups in found.items()}


def all_rows(result: Result) -> Iterator[tuple[str, str, Row]]:
    """(job, mode, row) of every race."""
    return ((*key, row) for key, groups in races(result).items() for group in groups for row in group)


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


def _target(job: str, mode: str) -> str:
    if (job, mode) in RATIOS:
        return f"Unsloth {RATIOS[job, mode]:g}x"
    if (job, mode) not in TARGETS:
        return "-"
    ms, gib = TARGETS[job, mode]
    return f"{ms:.0f} ms" + (f", {gib:g} GiB" if gib is not None else "")


def _floor(result: Result, job: str, mode: str) -> str:
    ceilings = result.get("ceilings", {})
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
    ran = {row["variant"] for groups in present.values() for group in groups for row in group}
    peers = [variant for variant in VARIANTS if variant in ran - {"hasten"}]
    rows = []
    for job, groups in present.items():
        every = [row for group in groups for row in group]
        ours = _of("hasten", every)
        rows.append(
            [JOBS[job].title, _figure(ours) if ours else "-", *(_beside(peer, groups) for peer in peers),
             _target(job, mode), _floor(result, job, mode), _alone(ours), _parity(every)]
        )  # fmt: skip
    head = ["a step of", "hasten", *(VARIANTS[peer] for peer in peers), "target", "floor", "matmuls alone",
            "losses differ by at most"]  # fmt: skip
    return table(head, rows)


def load_table(result: Result) -> str:
    rows = [
        [f"{job}, {mode}", VARIANTS[row["variant"]], f"{row['load_s']:.1f}", f"{row['first_step_s']:.1f}",
         "alone" if row["loaded_beside"] == 0 else f"beside {row['loaded_beside']} others"]
        for job, mode, row in all_rows(result) if row.get("load_s") is not None and "error" not in row
    ]  # fmt: skip
    return table(["job", "library", "seconds to load", "first step, seconds", "loaded"], rows)


def profile_table(result: Result) -> str:
    found: dict[tuple[str, str], Row] = {}
    for job, mode, row in all_rows(result):
        if "profile" in row:
            found.setdefault((job, mode), row["profile"])
    rows = []
    for (job, mode), profiled in found.items():
        kinds = (f"{kind} {entry['ms']:.1f}" for kind, entry in profiled["kinds"].items() if entry["ms"] >= 0.5)
        rows.append([f"{job}, {mode}", f"{profiled['wall_ms']:.0f}", ", ".join(kinds), f"{profiled['idle_ms']:.1f}"])
    return table(["job", "step, ms", "on the device in one profiled step, ms", "the rest, ms"], rows) if rows else ""


def costs_text(result: Result) -> str:
    costs = dict(result["fixed_costs"])
    lines = []
    if "import" in costs:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in costs.pop("import").items())
        lines.append(f"Seconds of import, each beyond the ones before it: {parts}.\n")
    rows = [
        [job, str(cost["host_waits"]["count"]), str(one["length"]), str(len(one["compiled"])),
         f"{one['first_ms']:.0f}", f"{one['second_ms']:.0f}"]
        for job, cost in costs.items() for one in cost["lengths"]
    ]  # fmt: skip
    if rows:
        head = ["job", "host waits a step", "then at length", "kernels compiled", "first step, ms", "second, ms"]
        lines.append(table(head, rows))
    return "\n".join(lines)


# Ops, packing, curves, sanitizers


def reached(row: Row, ceilings: Mapping[str, float]) -> tuple[str, float]:
    """("copy" or "matmul", the fraction of that ceiling that the op reaches): whichever bounds it."""
    least = {"copy": row["bytes"] / ceilings["copy"]}
    if "matmul" in ceilings:
        least["matmul"] = row["flops"] / ceilings["matmul"]
    bound = max(least, key=lambda name: least[name])
    return bound, least[bound] * 1e3 / row["ms"]


def op_line(row: Row, ceilings: Mapping[str, float]) -> str:
    bound, share = reached(row, ceilings)
    return f"{row['op']:48s} {row['ms']:8.3f} ms  {share:6.1%} of the {bound} ceiling"


def ops_table(result: Result) -> str:
    rows = []
    for row in result["ops"]:
        bound, share = reached(row, result["ceilings"])
        rate = row["bytes"] / row["ms"] / 1e9 if bound == "copy" else row["flops"] / row["ms"] / 1e9
        unit = "TB/s" if bound == "copy" else "TFLOP/s"
        rows.append([row["op"], f"{row['ms']:.3f}", f"{rate:.2f} {unit}", bound, f"{share:.0%}"])
    return table(["op", "ms", "reached", "bound by", "of that ceiling"], rows)


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
    setting, lengths = packing["setting"], packing["lengths"]
    said = (
        f"{setting['shape']} shape, LoRA r=16, nothing recomputed; {setting['rows']} sequences a step, the same in every way. "
        f"Lengths are log-normal with a median of {setting['median']:g} and sigma of {setting['sigma']:g}, at most "
        f"{setting['longest']} tokens: mean {lengths['mean']:.0f}, 10% below {lengths['p10']:.0f}, 10% above "
        f"{lengths['p90']:.0f}, 1% above {lengths['p99']:.0f}, longest {lengths['max']:.0f}. Padding does not count as tokens."
    )
    padded = next((row["tokens_per_s"] for row in packing["ways"] if row["way"] == "padded" and "ms" in row), None)
    rows = []
    for row in packing["ways"]:
        cells = ["-", "-", "-"]
        if "ms" in row:
            times = "-" if padded is None else f"{row['tokens_per_s'] / padded:.2f}x"
            cells = [f"{row['tokens_per_s'] / 1e3:.1f}k", times, f"{row['peak_gib']:.1f}"]
        padding = row["computed_tokens"] / packing["real_tokens"] - 1
        rows.append([WAYS[row["way"]][0], f"{padding:.1%}", *cells, f"{row['loss_off']:.1e}"])
    head = ["batches", "padding", "real tokens/s", "of padded", "peak GiB", "loss differs from padded by"]
    return [said, table(head, rows)]


def curves_table(result: Result) -> str:
    from benchmarks.curves import STAGES

    rows = []
    for stage, title in STAGES.items():
        one = result["curves"][stage]
        rows.append(
            [title, f"{one['inside']:.0%}", f"{one['final_stock']:.4f}", f"{one['final_hasten']:.4f}",
             or_dash(one["sigmas"], "+.2f"), f"{one['paired']:.4f}"]
        )  # fmt: skip
    head = ["200 steps of", "steps within stock's range", "final loss, stock", "hasten",
            "difference in standard deviations of stock's seeds", "largest difference of one seed"]  # fmt: skip
    return table(head, rows)


def sanitize_table(result: Result) -> str:
    rows = [[row["tool"], row["calls"], "yes" if row["clean"] else "no", row["verdict"]] for row in result["sanitize"]]
    return table(["tool", "kernels", "clean", "summary"], rows)


def readme_row(result: Result, job: str, mode: str) -> list[str]:
    """The README's cells about one job: what, hardware, result, reproduce. Raises LookupError without a figure of hasten's."""
    groups = races(result).get((job, mode), [])
    group = next((g for g in groups if "ms" in _of("hasten", g)), None)
    if group is None:
        raise LookupError(f"no figure of hasten's for {job}, {mode}")
    ours = _of("hasten", group)
    peers = [row for row in group if row["variant"] not in ("hasten", BEFORE) and "ms" in row]
    said = f"{ours['ms']:.0f} ms and {ours['peak_gib']:.1f} GiB a step"
    if peers:
        best = min(peers, key=lambda row: row["ms"])
        said += (
            f"; {VARIANTS[best['variant']]} {result['versions'][PACKAGE_OF[best['variant']]]} in the same run "
            f"{best['ms']:.0f} ms and {best['peak_gib']:.1f} GiB"
        )
    variants = ",".join(row["variant"] for row in group)
    command = f"`python -m benchmarks.gpu --out DIR --only train --jobs {job} --variants {variants} --modes {mode}`"
    return [f"{JOBS[job].title}, {MODES[mode]}", f"one {result['versions']['gpu'].split()[-1]}", said, command]
