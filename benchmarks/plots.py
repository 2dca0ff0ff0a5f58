"""The pictures of docs/benchmarks.md, drawn from results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.curves import STAGES


def _figure(columns: int, width: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def roofline(result: Mapping[str, Any], path: Path) -> None:
    """Each op's arithmetic intensity against the TFLOP/s it reaches, under the two measured ceilings."""
    figure, (axes,) = _figure(1, 9)
    ceilings, ops = result["ceilings"], result["ops"]
    intensity = [row["flops"] / row["bytes"] for row in ops]
    low, high = min(intensity) / 2, max(intensity) * 4
    peak = ceilings.get("matmul")
    ends = [low, high] if peak is None else [low, peak / ceilings["copy"], high]
    roof = [min(peak or float("inf"), at * ceilings["copy"]) / 1e12 for at in ends]
    axes.plot(ends, roof, color="black", linewidth=1.2, label="measured ceilings: copy, bf16 matmul")
    for number, (row, at) in enumerate(zip(ops, intensity, strict=True)):
        style = "osD^vP*X"[number // 10 % 8]
        axes.plot([at], [row["flops"] / row["ms"] / 1e9], style, color=f"C{number % 10}", label=row["op"], markersize=6)
    axes.set(
        xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP per byte that must move)",
        ylabel="reached TFLOP/s", title=f"hasten's ops on {result['versions']['gpu']}",
    )  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)


def budget(result: Mapping[str, Any], path: Path) -> None:
    """Step time against memory budget, one line a job. Crosses: measured peaks; square: "offload"; dashed: no budget at all."""
    figure, (axes,) = _figure(1, 8)
    for number, job in enumerate(dict.fromkeys(row["job"] for row in result["budget"])):
        rows, colour = [row for row in result["budget"] if row["job"] == job], f"C{number}"
        planned = sorted(
            (row["budget_gib"], row["peak_gib"], row["ms"]) for row in rows if row["budget_gib"] is not None
        )
        budgets, measured, times = zip(*planned, strict=True)
        axes.plot(budgets, times, "o-", color=colour, label=f"{job}, budget")
        axes.plot(measured, times, "x", color=colour, label=f"{job}, measured peak")
        for row in rows:
            if row["mode"] == "offload":
                axes.plot(
                    [row["peak_gib"]], [row["ms"]], "s", color=colour, markerfacecolor="none", label=f'{job}, "offload"'
                )
            elif row["times"] is None:
                axes.axhline(row["ms"], color=colour, linestyle="--", linewidth=1.0, label=f"{job}, no budget")
    axes.set(
        xlabel="memory (GiB)", ylabel="step (ms)", ylim=(0, None),
        title=f"step time against memory budget on {result['versions']['gpu']}",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def curves(result: Mapping[str, Any], path: Path) -> None:
    """hasten's mean loss over stock's range, per stage."""
    found = result["curves"]
    figure, panels = _figure(len(STAGES), 11)
    for axes, (stage, title) in zip(panels, STAGES.items(), strict=True):
        one = found[stage]
        steps = range(found["setting"]["smooth"], found["setting"]["smooth"] + len(one["mean"]))
        seeds = found["setting"]["seeds"]
        axes.fill_between(steps, one["low"], one["high"], alpha=0.35, label=f"transformers + PEFT, {seeds} seeds")
        axes.plot(steps, one["mean"], color="C3", linewidth=1.0, label=f"hasten, mean of {seeds} seeds")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
