"""The tables of docs/benchmarks.md and of the README, from results. Every figure in them comes from the JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.floors import floor_ms
from benchmarks.jobs import BEFORE, JOBS, MODES, PACKAGE_OF, RATIOS, TARGETS, VARIANTS
from benchmarks.race import GRADIENTS

Result = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def reached(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> tuple[str, float]:
    """("copy" or "matmul", the fraction of the op's floor that it reaches): the larger of its two least times rules."""
    least = {"copy": row["bytes"] / ceilings["copy"]}
    if "matmul" in ceilings:
        least["matmul"] = row["flops"] / ceilings["matmul"]
    bound = max(least, key=lambda name: least[name])
    return bound, least[bound] * 1e3 / row["ms"]


def op_line(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
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
        "matmul": "bf16 product of 8192^3 {:.0f} TFLOP/s", "copy": "copy {:.2f} TB/s",
        "attention_forward": "causal attention forward {:.0f}", "attention_backward": "and backward {:.0f} TFLOP/s",
    }  # fmt: skip
    return ", ".join(text.format(ceilings[name] / 1e12) for name, text in words.items() if name in ceilings)


def races(result: Result) -> dict[tuple[str, str], list[list[Mapping[str, Any]]]]:
    """{(job, mode): its groups of rows, the largest group first}, in the order of JOBS and MODES."""
    found: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for job in JOBS:
        for mode in MODES:
            for row in result.get("train", []):
                if (row["job"], row["mode"]) == (job, mode):
                    found.setdefault((job, mode), {}).setdefault(row["group"], []).append(row)
    return {key: sorted(groups.values(), key=len, reverse=True) for key, groups in found.items()}


def _figure(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"fails: {row['error'].splitlines()[0][:60]}"
    if "ms" not in row:
        parity = row["parity"]
        all_the_same = _measured(row["unchecked"]) + "; " if row.get("unchecked") else ""
        if (parity.get("gradients") or 0) > GRADIENTS:
            return f"{all_the_same}gradients {parity['gradients']:.1%} from {VARIANTS[parity['against']]}"
        return f"{all_the_same}losses {parity['worst']:.1e} from {VARIANTS[parity['against']]} at step {parity['step']}"
    return _measured(row)


def _measured(row: Mapping[str, Any]) -> str:
    return f"{row['ms']:.0f} ms, {row['peak_gib']:.1f} GiB"


def _parity(rows: Iterable[Mapping[str, Any]]) -> str:
    known = [row["parity"] for row in rows if row["variant"] == "hasten" and row.get("parity", {}).get("against")]
    if not known:
        return "nobody beside it"
    worst = max(known, key=lambda one: one["worst"])
    gradients = worst.get("gradients")
    said = "" if gradients is None else f", gradients by {gradients:.1%}"
    return f"{worst['worst']:.1e}{said} ({VARIANTS[worst['against']]})"


def training_table(result: Result, mode: str) -> str:
    """One line per job: hasten, each library that ran, target and floor. A ratio is over hasten in the same race."""
    present = [(key, groups) for key, groups in races(result).items() if key[1] == mode]
    ran = {row["variant"] for _, groups in present for group in groups for row in group} - {"hasten"}
    peers = [variant for variant in VARIANTS if variant in ran]
    rows = []
    for (job, _), groups in present:
        ours = next((row for group in groups for row in group if row["variant"] == "hasten"), None)
        cells = [JOBS[job].title, "-" if ours is None else _figure(ours)]
        for peer in peers:
            cells.append(
                next((_beside(peer, group) for group in groups if any(r["variant"] == peer for r in group)), "-")
            )
        cells += [
            _target(job, mode),
            _floor(result, job, mode),
            _alone(ours),
            _parity(row for group in groups for row in group),
        ]
        rows.append(cells)
    head = [
        "a step of",
        "hasten",
        *(VARIANTS[peer] for peer in peers),
        "target",
        "floor",
        "products alone",
        "losses differ by at most",
    ]
    return table(head, rows)


def _beside(peer: str, group: Sequence[Mapping[str, Any]]) -> str:
    theirs = next(row for row in group if row["variant"] == peer)
    ours = next((row for row in group if row["variant"] == "hasten"), {})
    ratio = f" ({theirs['ms'] / ours['ms']:.2f}x)" if "ms" in theirs and "ms" in ours else ""
    return _figure(theirs) + ratio


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


def _alone(ours: Mapping[str, Any] | None) -> str:
    """What the step's products and attention take alone, and that as a share of hasten's whole step."""
    if ours is None or not ours.get("alone_ms"):
        return "-"
    share = f" ({ours['alone_ms'] / ours['ms']:.0%} of hasten's step)" if "ms" in ours else ""
    return f"{ours['alone_ms']:.0f} ms{share}"


def load_table(result: Result) -> str:
    rows = []
    for (job, mode), groups in races(result).items():
        for row in (row for group in groups for row in group if row.get("load_s") is not None and "error" not in row):
            beside = row["loaded_beside"]
            rows.append(
                [f"{job}, {mode}", VARIANTS[row["variant"]], f"{row['load_s']:.1f}", f"{row['first_step_s']:.1f}",
                 "alone" if beside == 0 else f"beside {beside} others"]
            )  # fmt: skip
    return table(["job", "library", "seconds to load", "first step, seconds", "loaded"], rows)


def costs_text(result: Result) -> str:
    costs = dict(result["fixed_costs"])
    lines = []
    if "import" in costs:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in costs.pop("import").items())
        lines.append(f"Seconds of import, each beyond the ones before it: {parts}.\n")
    rows = []
    for job, cost in costs.items():
        for length in cost["lengths"]:
            rows.append(
                [job, str(cost["host_waits"]["count"]), str(length["length"]), str(len(length["compiled"])),
                 f"{length['first_ms']:.0f}", f"{length['second_ms']:.0f}"]
            )  # fmt: skip
    if rows:
        head = ["job", "host waits a step", "then at length", "kernels compiled", "first step, ms", "second, ms"]
        lines.append(table(head, rows))
    return "\n".join(lines)


def profile_table(result: Result) -> str:
    rows = []
    for (job, mode), groups in races(result).items():
        profiled = next((row["profile"] for group in groups for row in group if "profile" in row), None)
        if profiled is None:
            continue
        parts = ", ".join(
            f"{kind} {entry['ms']:.1f}" for kind, entry in profiled["kinds"].items() if entry["ms"] >= 0.5
        )
        rows.append([f"{job}, {mode}", f"{profiled['wall_ms']:.0f}", parts, f"{profiled['idle_ms']:.1f}"])
    return table(["job", "step, ms", "on the device in one profiled step, ms", "the rest, ms"], rows) if rows else ""


def curves_table(result: Result) -> str:
    from benchmarks.curves import STAGES

    rows = []
    for stage, title in STAGES.items():
        one = result["curves"][stage]
        sigmas = "-" if one["sigmas"] is None else f"{one['sigmas']:+.2f}"
        rows.append(
            [title, f"{one['inside']:.0%}", f"{one['final_stock']:.4f}", f"{one['final_hasten']:.4f}", sigmas,
             f"{one['paired']:.4f}"]
        )  # fmt: skip
    head = ["200 steps of", "steps inside stock's spread", "final loss, stock", "hasten",
            "difference in standard deviations of stock's seeds", "largest difference of one seed"]  # fmt: skip
    return table(head, rows)


def packing_section(result: Result) -> list[str]:
    """What the rows are like, and the ways to train on them."""
    from benchmarks.packing_speed import WAYS

    packing = result["packing"]
    setting, lengths, real = packing["setting"], packing["lengths"], packing["real_tokens"]
    said = (
        f"{setting['shape']} shape, LoRA r=16, nothing recomputed; {setting['rows']} rows a step, the same ones in every way. "
        f"Lengths are log-normal with a median of {setting['median']:g} and sigma of {setting['sigma']:g}, at most "
        f"{setting['longest']} tokens: mean {lengths['mean']:.0f}, 10% below {lengths['p10']:.0f}, 10% above "
        f"{lengths['p90']:.0f}, 1% above {lengths['p99']:.0f}, longest {lengths['max']:.0f}. Only real tokens are counted."
    )
    padded = next((row["tokens_per_s"] for row in packing["ways"] if row["way"] == "padded" and "ms" in row), None)
    rows = []
    for row in packing["ways"]:
        cells = ["-", "-", "-"]
        if "ms" in row:
            times = "-" if padded is None else f"{row['tokens_per_s'] / padded:.2f}x"
            cells = [f"{row['tokens_per_s'] / 1e3:.1f}k", times, f"{row['peak_gib']:.1f}"]
        share = row["computed_tokens"] / real - 1
        rows.append([WAYS[row["way"]][0], f"{share:.1%}", *cells, f"{row['loss_off']:.1e}"])
    head = ["rows come as", "padding", "real tokens/s", "of padded", "peak GiB", "loss differs from padded by"]
    return [said, table(head, rows)]


def sanitize_table(result: Result) -> str:
    rows = [[row["tool"], row["calls"], "yes" if row["clean"] else "no", row["verdict"]] for row in result["sanitize"]]
    return table(["tool", "kernels", "clean", "what it said"], rows)


def readme_row(result: Result, job: str, mode: str) -> list[str]:
    """The README's cells about one job: what, hardware, result, reproduce. Raises LookupError without a figure of hasten's."""
    groups = races(result).get((job, mode), [])
    group = next((g for g in groups if any(row["variant"] == "hasten" and "ms" in row for row in g)), None)
    if group is None:
        raise LookupError(f"no figure of hasten's for {job}, {mode}")
    ours = next(row for row in group if row["variant"] == "hasten")
    peers = [row for row in group if row is not ours and row["variant"] != BEFORE and "ms" in row]
    said = f"{ours['ms']:.0f} ms and {ours['peak_gib']:.1f} GiB a step"
    if peers:
        best = min(peers, key=lambda row: row["ms"])
        package = PACKAGE_OF[best["variant"]]
        said += (
            f"; {VARIANTS[best['variant']]} {result['versions'][package]} in the same run {best['ms']:.0f} ms and "
            f"{best['peak_gib']:.1f} GiB"
        )
    variants = ",".join(row["variant"] for row in group)
    command = f"`python -m benchmarks.gpu --out DIR --only train --jobs {job} --variants {variants} --modes {mode}`"
    hardware = f"one {result['versions']['gpu'].split()[-1]}"
    return [f"{JOBS[job].title}, {MODES[mode]}", hardware, said, command]
