"""Train a LoRA, merge it into 16-bit weights, and load the result with plain transformers.

Usage: python merge_and_reload.py [CHECKPOINT [OUTPUT]]      (without them: a tiny random model, a temporary folder)
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten import FastLanguageModel
from hasten.testing import save_tiny


def main(checkpoint: str, output: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint, max_seq_length=256, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(model, r=8)
    batch = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").to(model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    FastLanguageModel.for_training(model)
    for _ in range(10):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss after ten steps: {loss.item():.3f}")

    merged = Path(output) / "merged"
    model.save_pretrained_merged(merged, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).to(model.device).eval()
    same_ids = AutoTokenizer.from_pretrained(merged)("The quick brown fox").input_ids
    assert same_ids == tokenizer("The quick brown fox").input_ids

    FastLanguageModel.for_inference(model)
    with torch.no_grad():
        ours, theirs = model(**batch).logits, plain(**batch).logits
    print(f"relative difference of logits: {(ours - theirs).abs().max() / ours.abs().max():.1e}")
    print(sorted(path.name for path in merged.iterdir()))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)),
        given[1] if len(given) > 1 else tempfile.mkdtemp(),
    )
