"""The sanitizers' list reaches every kernel, and their words are read rightly."""

import importlib
from pathlib import Path
from typing import Any

import pytest

import hasten
from benchmarks import kernel_calls, sanitize
from benchmarks.kernels import launched_kernels


@pytest.mark.full
def test_every_launched_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are counted where `kernel[grid]` is looked up, in the interpreter and on a GPU alike."""
    _every_launched_kernel_is_called(list(kernel_calls.CALLS), monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("tool", sanitize.NOT_UNDER)
def test_what_a_tool_cannot_run_is_reached_another_way(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in kernel_calls.CALLS if name not in sanitize.NOT_UNDER[tool]]
    _every_launched_kernel_is_called(names, monkeypatch)


def _every_launched_kernel_is_called(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = launched_kernels()
    assert {"_norm_fwd", "_score_rows", "_dequantize"} <= set(wanted)
    seen: set[str] = set()

    def listening(inner: Any) -> Any:
        def look_up(self: Any, grid: Any) -> Any:
            seen.add(self.__name__)
            return inner(self, grid)

        return look_up

    kinds = set()
    for name, path in wanted.items():
        parts = path.relative_to(Path(hasten.__file__).parent.parent).with_suffix("").parts
        kinds.add(type(getattr(importlib.import_module(".".join(parts)), name)))
    for kind in kinds:
        monkeypatch.setattr(kind, "__getitem__", listening(kind.__getitem__))
    kernel_calls.call_all(names)
    assert set(wanted) <= seen, f"add calls of {sorted(set(wanted) - seen)} to benchmarks/kernel_calls.py"


DONE = "called norms\n"
CLEAN = f"========= COMPUTE-SANITIZER\n{DONE}========= ERROR SUMMARY: 0 errors\n"
OURS = (
    "========= Invalid __global__ write of size 2 bytes\n=========     at _norm_fwd+0x120 in kernel.py:33\n"
    f"=========     by thread (1,0,0)\n{DONE}========= ERROR SUMMARY: 1 error\n"
)
THEIRS = OURS.replace("_norm_fwd", "void at::native::copy<(int)4>(float *)")
REFUSED = "========= Error: Target application terminated before first instrumented API call\n"
RACES = (
    "========= Error: Race reported between Write access at _norm_fwd+0x310 in kernel.py:3\n"
    f"=========     and Read access at _norm_fwd+0x350 in kernel.py:5 [8 hazards]\n{DONE}"
    "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
)
RACE = f"========= COMPUTE-SANITIZER\n{DONE}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("code", "text", "clean", "ours"),
    [
        (0, CLEAN, True, {}),
        (0, RACE, True, {}),
        (1, OURS, False, {"_norm_fwd": 1}),
        (1, RACES, False, {"_norm_fwd": 2}),
        (1, THEIRS, True, {}),
        (1, OURS + THEIRS, False, {"_norm_fwd": 1}),
        (1, CLEAN, False, {}),
        (0, CLEAN.replace(DONE, ""), False, {}),
        (1, REFUSED, False, {}),
        (1, "", False, {}),
    ],
    ids=[
        "clean",
        "no races",
        "ours",
        "a race",
        "another library's",
        "both",
        "exit code",
        "not finished",
        "refused",
        "nothing",
    ],
)
def test_verdicts(code: int, text: str, clean: bool, ours: dict[str, int]) -> None:
    row = sanitize.judge("memcheck", ["_norm_fwd", "_norm_bwd"], code, text)
    assert row["clean"] is clean and row["ours"] == ours


def test_a_missing_sanitizer_is_not_clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sanitize, "command_for", lambda tool, kernels, calls: ["no-such-sanitizer"])
    (row,) = sanitize.sanitize(["memcheck"], tmp_path / "log.txt", ["norms"])
    assert not row["clean"] and "no-such-sanitizer" in row["verdict"]
    assert "no-such-sanitizer" in (tmp_path / "log.txt").read_text()


def test_only_initcheck_watches_everything() -> None:
    assert "kernel_substring=_norm_fwd" in sanitize.command_for("racecheck", ["_norm_fwd"], "norms")
    assert "--kernel-name" not in sanitize.command_for("initcheck", ["_norm_fwd"], "norms")
