"""A worker that speaks the protocol of harness/serve.py without a model, and results as a machine would write them."""

import json
import sys
from pathlib import Path
from typing import Any

FAKE = Path(__file__).with_name("fake_worker.py")


def fake_command(**behaviour: Any) -> list[str]:
    """How to start a fake worker; see fake_worker.py for what it can be told."""
    return [sys.executable, str(FAKE), json.dumps(behaviour)]


def train_row(variant: str, ms: float, **changes: Any) -> dict[str, Any]:
    row = {
        "job": "8b-lora", "mode": "keep", "shape": "llama-8b", "batch": 4, "length": 2048, "variant": variant,
        "group": "hasten+unsloth", "ms": ms, "min_ms": ms - 1, "max_ms": ms + 1, "steps": 9, "peak_gib": 40.25,
        "reserved_gib": 44.0, "losses": [12.5, 12.25], "first_step_s": 3.5, "load_s": 10.5, "import_s": 2.0,
        "loaded_beside": 1, "parity": {"ok": True, "worst": 0.0005, "step": 1, "compared": 2, "against": "unsloth"},
    }  # fmt: skip
    return {**row, **changes}


def budget_row(mode: str, times: float | None, budget_gib: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "job": "8b-qlora", "mode": mode, "times": times, "budget_gib": budget_gib, "peak_gib": 8.0, "reserved_gib": 9.0,
        "predicted_gib": 7.6, "ms": 900.0, "losses": [12.5], "plan": "a plan", "ok": True,
    }  # fmt: skip
    return {**row, **changes}


def longest_row(variant: str, cap_gib: float | None, length: int, **changes: Any) -> dict[str, Any]:
    row = {
        "variant": variant, "cap_gib": cap_gib, "length": length, "offload_embedding": False, "ok": True, "peak_gib": 21.25, "reserved_gib": 22.5,
        "predicted_gib": 21.0, "seconds": 75.25, "loss": 11.5, "plan": "a plan", "error": None, "allocator": None,
    }  # fmt: skip
    return {**row, **changes}


def example_result() -> dict[str, Any]:
    """Every part that a result can have, with figures that are easy to find again."""
    curve = {
        "low": [3.0, 2.5], "high": [3.5, 3.0], "mean": [3.25, 2.75], "inside": 1.0, "final_stock": 2.7512,
        "final_hasten": 2.7534, "sigmas": 0.25, "paired": 0.0123,
    }  # fmt: skip
    kinds = {"matmuls": {"ms": 300.5, "calls": 450}, "_norm_fwd": {"ms": 5.25, "calls": 64}}
    return {
        "date": "2026-01-02",
        "versions": {"gpu": "NVIDIA H900", "torch": "9.8.7", "unsloth": "2026.1.1", "trl": "not installed"},
        "ceilings": {"matmul": 800e12, "copy": 4e12, "attention_forward": 500e12, "attention_backward": 400e12},
        "ops": [
            {"op": "RMSNorm, forward", "ms": 0.05, "bytes": 1e8, "flops": 1e8},
            {"op": "MLP", "ms": 10.0, "bytes": 1e9, "flops": 4e12},
        ],
        "train": [
            train_row("hasten", 400.4, profile={"wall_ms": 400.4, "busy_ms": 399.0, "idle_ms": 1.4, "kinds": kinds}),
            train_row("unsloth", 500.5, parity={"against": None}),
            train_row("hasten", 411.1, group="hasten"),
            train_row("hasten", 444.4, mode="budget", plan="16 of 32 layers so", predicted_gib=38.64),
        ],
        "fixed_costs": {
            "import": {"torch": 1.0, "transformers": 2.0, "peft": 0.5, "hasten": 0.123},
            "8b-lora keep": {
                "host_waits": {"count": 3, "where": ["x.py:1"]},
                "lengths": [{"length": 1999, "compiled": ["_norm_fwd"], "first_ms": 777.0, "second_ms": 390.0}],
            },
        },
        "curves": {"setting": {"smooth": 10, "seeds": 5, "steps": 200}, "seconds": {"all": 60.0}, "full": curve, "lora": curve},
        "packing": {
            "setting": {"shape": "llama-1b", "rows": 128, "median": 150.0, "sigma": 0.6, "longest": 1024},
            "lengths": {"mean": 181.4, "p10": 70.0, "p90": 320.0, "p99": 613.0, "max": 1017.0},
            "real_tokens": 1000,
            "ways": [
                {"way": "padded", "computed_tokens": 3456, "loss_off": 0.0, "ms": 500.0, "tokens_per_s": 41000.0, "peak_gib": 9.5},
                {"way": "packed-4096", "computed_tokens": 1000, "loss_off": 3e-5, "ms": 200.0, "tokens_per_s": 102500.0, "peak_gib": 6.5},
                {"way": "padding-free", "computed_tokens": 1000, "loss_off": 0.5},
            ],
        },
        "budget": [
            budget_row("offload", None, None),
            budget_row("auto", 1.5, 12.0, ms=707.0, peak_gib=11.5),
            budget_row("auto", None, None, ms=505.0, peak_gib=29.5),
        ],
        "longest": [
            longest_row("hasten", 24.0, 163840),
            longest_row("hasten", 24.0, 262144, ok=False, seconds=None, loss=None, error="OutOfMemoryError: CUDA out of memory"),
            longest_row("hasten", None, 8192, peak_gib=7.5),
            longest_row("unsloth", 24.0, 65536, plan=None, predicted_gib=None),
        ],
        "linearity": {"gib_at_zero": 6.25, "gib_per_1024": 0.125, "residual_gib": 0.015, "residual_share": 0.002, "rows": 4},
        "sanitize": [{"tool": "memcheck", "calls": "norms", "clean": True, "verdict": "ERROR SUMMARY: 0 errors", "at": {}, "ours": {}}],
    }  # fmt: skip
