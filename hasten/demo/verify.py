"""Compares the merged model with base + adapter, both loaded by plain transformers in a new process."""

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
"""Largest allowed difference, as a fraction of the adapter's effect on the logits (root mean square). Rounding the
merged weights to bf16 once, 2**-9 of each, gives a few thousandths; omitting one matrix of one layer gives several
hundredths."""


@dataclass(frozen=True)
class Agreement:
    """Logit differences between the merged model and base + adapter, over `tokens` positions, in fp32."""

    tokens: int
    max_difference: float
    max_effect_of_adapter: float
    rms_difference: float
    rms_effect_of_adapter: float
    same_argmax: float
    hasten_imported: bool

    @property
    def share(self) -> float:
        """RMS of the difference, as a fraction of the RMS of the adapter's effect."""
        return self.rms_difference / self.rms_effect_of_adapter if self.rms_effect_of_adapter else float("inf")

    def check(self) -> None:
        """Raises AccuracyError if the merged model differs from base + adapter by more than rounding."""
        if self.hasten_imported:
            raise AccuracyError(
                "the process for plain transformers imported hasten, so the comparison is not independent"
            )
        if not self.share <= LARGEST_SHARE:
            raise AccuracyError(
                f"logits of the merged model are {self.rms_difference:.3g} (rms) off base + adapter, "
                f"{self.share:.2%} of the adapter's effect of {self.rms_effect_of_adapter:.3g}; rounding explains at most {LARGEST_SHARE:.0%}"
            )


def compare_in_plain_transformers(
    base: Path, adapter: Path, merged: Path, tokenizer: Any, questions: Sequence[Question], work: Path
) -> Agreement:
    """Runs `plain_check.py` on questions and answers. Raises AccuracyError if the models cannot be loaded."""
    inputs = encode(tokenizer, questions)
    lengths = inputs["attention_mask"].sum(1).tolist()
    sequences = [ids[:length].tolist() for ids, length in zip(inputs["input_ids"], lengths, strict=True)]
    sequences_file, result = work / "logits_sequences.json", work / "logits.json"
    sequences_file.write_text(json.dumps(sequences), encoding="utf-8")
    result.unlink(missing_ok=True)
    script = Path(__file__).with_name("plain_check.py")
    # -P: the script's own folder must not be on the path, where its modules would shadow others.
    command = [sys.executable, "-P", script, base, adapter, merged, sequences_file, result]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise AccuracyError(f"plain transformers could not load {merged}:\n{done.stderr[-2000:]}")
    return Agreement(**json.loads(result.read_text(encoding="utf-8")))
