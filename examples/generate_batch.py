"""Generation: prompts of different lengths in one batch, greedy and sampled, and one answer streamed token by token.

Usage: python generate_batch.py [CHECKPOINT]      (without it: a tiny random model)
"""

import sys
import tempfile

import torch
from transformers import TextStreamer

from hasten import FastLanguageModel
from hasten.testing import save_tiny

PROMPTS = ["Once upon a time", "A haiku about rain, please:", "2 + 2 ="]


def main(checkpoint: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=256, load_in_4bit=True)
    FastLanguageModel.for_inference(model)

    # Prompts may be padded on either side; each gets the continuation that it would get alone.
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(model.device)
    width = batch["input_ids"].shape[1]
    greedy = model.generate(**batch, max_new_tokens=24, do_sample=False)
    for prompt, row in zip(PROMPTS, greedy, strict=True):
        print(f"{prompt!r} -> {tokenizer.decode(row[width:], skip_special_tokens=True)!r}")

    torch.manual_seed(0)
    sampled = model.generate(**batch, max_new_tokens=24, do_sample=True, temperature=0.8, num_return_sequences=2)
    print(f"{len(sampled)} samples, {len({tuple(row.tolist()) for row in sampled})} of them different")

    single = tokenizer(PROMPTS[0], return_tensors="pt").to(model.device)
    model.generate(**single, max_new_tokens=24, do_sample=False, streamer=TextStreamer(tokenizer))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)))
