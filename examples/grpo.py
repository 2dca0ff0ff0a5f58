"""Reinforcement learning with TRL's GRPOTrainer: generates answers and rewards the fraction of lower-case letters.

Usage: python grpo.py [CHECKPOINT [OUTPUT]]      (without them: a tiny random model, a temporary folder)
"""

import sys
import tempfile

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hasten import FastLanguageModel
from hasten.testing import save_tiny


def fraction_of_letters(completions: list[str], **kwargs: object) -> list[float]:
    """The reward: the fraction of an answer's characters that are lower-case letters."""
    return [sum(c.isascii() and c.islower() for c in text) / max(len(text), 1) for text in completions]


def main(checkpoint: str, output: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=256, load_in_4bit=True)
    # The head trains fully only because this base has random weights; a pretrained model does not need it.
    model = FastLanguageModel.get_peft_model(model, r=16, target_modules=["q_proj", "o_proj", "down_proj", "lm_head"])
    args = GRPOConfig(
        output_dir=output,
        max_steps=12,
        per_device_train_batch_size=16,
        num_generations=16,
        max_completion_length=12,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,  # hasten's own is set by from_pretrained
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=fraction_of_letters,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"Write about {number}:" for number in range(40)]}),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward: {rewards[0]:.3f} -> {rewards[-1]:.3f}")
    model.save_pretrained(output)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)),
        given[1] if len(given) > 1 else tempfile.mkdtemp(),
    )
