"""Imports, compilations and host waits are counted, and nothing that was set for counting stays."""

from types import SimpleNamespace
from typing import Any

import pytest
from triton import knobs

from benchmarks import step_costs


@pytest.mark.full
def test_imports_are_timed_in_order() -> None:
    seconds = step_costs.import_seconds(1)
    assert list(seconds) == ["torch", "transformers", "peft", "hasten"]
    assert seconds["torch"] > 0.05 and all(value >= 0 for value in seconds.values())


def test_compilations_are_counted_and_the_hook_goes() -> None:
    before = knobs.runtime.jit_post_compile_hook
    with step_costs.compilations() as names:
        hook: Any = knobs.runtime.jit_post_compile_hook
        hook(key="k", repr="r", fn=SimpleNamespace(name="_norm_fwd"), compile={}, already_compiled=False)
    assert names == ["_norm_fwd"] and knobs.runtime.jit_post_compile_hook is before


def test_a_new_length_tells_what_it_compiled() -> None:
    class Steps:
        def batch(self, length: int) -> int:
            return length

        def timed(self, ids: int) -> tuple[float, float]:
            hook: Any = knobs.runtime.jit_post_compile_hook
            if hook is not None and ids == 33:
                hook(fn=SimpleNamespace(name="_glu_fwd"))
            return 0.25, 1.0

    rows = step_costs.new_lengths(Steps(), [64, 33])  # pyright: ignore[reportArgumentType]
    assert [row["compiled"] for row in rows] == [[], ["_glu_fwd"]] and rows[1]["first_ms"] == 250
