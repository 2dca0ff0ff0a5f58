"""Training within a memory budget: estimate a step before loading, plan activation checkpointing to fit, no padding.

Usage: python memory_budget.py [CHECKPOINT [OUTPUT]]      (without them: a tiny random model, a temporary folder)
"""

import sys
import tempfile

from datasets import Dataset
from trl import SFTTrainer

import hasten
from hasten import FastLanguageModel, sft_config
from hasten.testing import save_tiny

BUDGET = "8GiB"  # of GPU memory, or of CPU memory without a GPU
LENGTH = 512


def main(checkpoint: str, output: str) -> None:
    expected = hasten.estimate(checkpoint, batch_size=4, seq_len=LENGTH, checkpointing="auto", memory_budget=BUDGET)
    print(f"a step will take about {expected.total / 2**20:.0f} MiB: {expected.plan}")

    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint,
        max_seq_length=LENGTH,
        load_in_4bit=True,
        use_gradient_checkpointing="auto",  # per layer: save, recompute or offload, as the budget allows
        memory_budget=BUDGET,
        unsloth_tiled_mlp="auto",
    )
    model = FastLanguageModel.get_peft_model(model, r=16)

    texts = [f"The number after {number} is {number + 1}." * (1 + number % 5) for number in range(80)]
    args = sft_config(
        model,
        output_dir=output,
        max_steps=8,
        per_device_train_batch_size=4,
        padding_free=True,  # examples concatenated: no padding tokens, and no attention across examples
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    dataset = Dataset.from_dict({"text": texts})
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print("\n".join(line for line in str(hasten.report(model)).splitlines() if "memory" in line))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)),
        given[1] if len(given) > 1 else tempfile.mkdtemp(),
    )
