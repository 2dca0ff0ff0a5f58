"""The sanitizers' list reaches every kernel, and their words are read rightly."""

from pathlib import Path

import pytest
from product_kit import launches

from benchmarks import kernel_calls, sanitize
from benchmarks.kernels import launched_kernels


@pytest.mark.full
def test_every_launched_kernel_is_called() -> None:
    _every_launched_kernel_is_called(list(kernel_calls.CALLS))


@pytest.mark.full
@pytest.mark.parametrize("tool", sanitize.NOT_UNDER)
def test_what_a_tool_cannot_run_is_reached_another_way(tool: str) -> None:
    names = [name for name in kernel_calls.CALLS if name not in sanitize.NOT_UNDER[tool]]
    _every_launched_kernel_is_called(names)


def _every_launched_kernel_is_called(names: list[str]) -> None:
    wanted = set(launched_kernels())
    assert {"_norm_fwd", "_score_rows", "_dequantize"} <= wanted
    with launches() as seen:
        kernel_calls.call_all(names)
    missing = sorted(wanted - {one.kernel for one in seen})
    assert not missing, f"add calls of {missing} to benchmarks/kernel_calls.py"


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
