"""Checks in a separate process, which never imports hasten, that the merged model equals base + adapter.

    python plain_check.py BASE ADAPTER MERGED SEQUENCES.json RESULT.json

Compares plain transformers on MERGED with plain transformers + PEFT on BASE and ADAPTER, in fp32, on the token ids of
SEQUENCES (a list of lists), and writes the differences of the logits to RESULT.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, merged: str, sequences_file: str, result_file: str) -> None:
    sequences = json.loads(Path(sequences_file).read_text(encoding="utf-8"))
    plain_base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = _logits(plain_base, sequences)
    trained = _logits(PeftModel.from_pretrained(plain_base, adapter), sequences)
    after_merge = _logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), sequences)
    result = {
        "tokens": len(trained),
        "max_difference": (after_merge - trained).abs().max().item(),
        "max_effect_of_adapter": (without - trained).abs().max().item(),
        "rms_difference": _rms(after_merge - trained),
        "rms_effect_of_adapter": _rms(without - trained),
        "same_argmax": (after_merge.argmax(-1) == trained.argmax(-1)).float().mean().item(),
        "hasten_imported": any(name.split(".")[0] == "hasten" for name in sys.modules),
    }
    Path(result_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _logits(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """Returns (tokens of all sequences, vocabulary), fp32. One sequence at a time, so that nothing is padded."""
    model.eval()
    return torch.cat([model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences])


def _rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
