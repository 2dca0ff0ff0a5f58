"""New words: trains `embed_tokens` and `lm_head` fully together with a LoRA, and reloads both with the adapter.

Usage: python train_embeddings.py [CHECKPOINT [OUTPUT]]      (without them: a tiny random model, a temporary folder)
"""

import sys
import tempfile

import torch
from datasets import Dataset
from trl import SFTTrainer

from hasten import FastLanguageModel, sft_config
from hasten.testing import save_tiny


def main(checkpoint: str, output: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint, max_seq_length=128, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(
        model, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"]
    )
    args = sft_config(
        model,
        output_dir=output,
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dataset = Dataset.from_dict({"text": [f"glorp {number} blick {number + 1}" for number in range(80)]})
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    # Loads base and adapter in one call; training can continue from here.
    again, _ = FastLanguageModel.from_pretrained(output, max_seq_length=128, load_in_4bit=False, dtype=torch.float32)
    ids = tokenizer("glorp 3 blick", return_tensors="pt").input_ids
    model, again = FastLanguageModel.for_inference(model), FastLanguageModel.for_inference(again)
    with torch.no_grad():
        difference = (model(input_ids=ids).logits - again(input_ids=ids).logits).abs().max()
    print(f"largest difference of logits after reloading: {difference:.1e}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)),
        given[1] if len(given) > 1 else tempfile.mkdtemp(),
    )
