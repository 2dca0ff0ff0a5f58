"""Merge to 16 bit, reload with plain transformers in a fresh process, and judge whether it is the same model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.demo.corpus import Question
from hasten.demo.evaluate import encode
from hasten.errors import AccuracyError

LARGEST_SHARE = 0.02
"""Of the adapter's own effect on the logits (root mean square). Rounding the merged weights to bf16 once, 2**-9 of each,
costs a few thousandths of it; a merge that forgets one matrix of one layer costs several hundredths."""


@dataclass(frozen=True)
class Agreement:
    """Differences of logits between the merged model and base + adapter, over `tokens` positions, in fp32."""

    tokens: int
    max_difference: float
    max_effect_of_adapter: float
    rms_difference: float
    rms_effect_of_adapter: float
    same_argmax: float
    hasten_imported: bool

    @property
    def share(self) -> float:
        """How much of the adapter's effect was lost or added, as root mean squares."""
        return self.rms_difference / self.rms_effect_of_adapter if self.rms_effect_of_adapter else float("inf")

    def check(self) -> None:
        """Raises AccuracyError where the merged model is not the model that was trained."""
        if self.hasten_imported:
            raise AccuracyError("the process that was to use plain transformers imported hasten, so it proves nothing")
        if not self.share <= LARGEST_SHARE:
            raise AccuracyError(
                f"logits of the merged model are {self.rms_difference:.3g} (rms) off base + adapter, {self.share:.2%} of "
                f"the adapter's effect of {self.rms_effect_of_adapter:.3g}; at most {LARGEST_SHARE:.0%} is rounding"
            )


def compare_in_plain_transformers(
    base: Path, adapter: Path, merged: Path, tokenizer: Any, questions: Sequence[Question], work: Path
) -> Agreement:
    """Runs `plain_check.py` on the questions with their answers. Raises AccuracyError if the models cannot be loaded."""
    inputs = encode(tokenizer, questions)
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = [row[:length].tolist() for row, length in zip(inputs["input_ids"], lengths, strict=True)]
    rows_file, result = work / "logits_rows.json", work / "logits.json"
    rows_file.write_text(json.dumps(rows), encoding="utf-8")
    result.unlink(missing_ok=True)
    script = Path(__file__).with_name("plain_check.py")
    # -P: without the script's own folder on the path, whose module names are not meant to be found at the top.
    command = [sys.executable, "-P", script, base, adapter, merged, rows_file, result]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise AccuracyError(f"plain transformers could not load {merged}:\n{done.stderr[-2000:]}")
    return Agreement(**json.loads(result.read_text(encoding="utf-8")))
