"""Preference training with TRL's DPOTrainer; the reference model is the same model with its adapter disabled.

Usage: python dpo.py [CHECKPOINT [OUTPUT]]      (without them: a tiny random model, a temporary folder)
"""

import sys
import tempfile

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from hasten import FastLanguageModel
from hasten.testing import save_tiny


def main(checkpoint: str, output: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=256, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16)
    rows = [
        {"prompt": f"Say {number}.", "chosen": f" {number}, gladly.", "rejected": f" No, not {number}."}
        for number in range(80)
    ]
    args = DPOConfig(
        output_dir=output,
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        max_length=256,
        beta=0.1,
        bf16=False,
        gradient_checkpointing=False,  # hasten's own is set by from_pretrained
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"margin of the chosen answer: {margins[0]:.3f} -> {margins[-1]:.3f}")
    model.save_pretrained(output)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)),
        given[1] if len(given) > 1 else tempfile.mkdtemp(),
    )
