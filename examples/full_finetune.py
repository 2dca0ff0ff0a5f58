"""Full fine-tuning: every weight trains, no adapter, packed rows, evaluation after each epoch.

Usage: python full_finetune.py [CHECKPOINT [OUTPUT]]      (without them: a tiny random model, a temporary folder)
"""

import sys
import tempfile

from datasets import Dataset
from trl import SFTTrainer

from hasten import FastLanguageModel, sft_config
from hasten.testing import save_tiny


def main(checkpoint: str, output: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint, max_seq_length=256, load_in_4bit=False, load_in_16bit=True, full_finetuning=True
    )
    print(f"{model.num_parameters(only_trainable=True):,} of {model.num_parameters():,} parameters train")

    texts = [f"The square of {number} is {number * number}." for number in range(120)]
    dataset = Dataset.from_dict({"text": texts}).train_test_split(test_size=20, seed=0)
    args = sft_config(
        model,
        output_dir=output,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=2e-3,
        packing=True,
        padding_free=True,
        eval_strategy="epoch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        args=args,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
    model.save_pretrained(output)  # a transformers checkpoint
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)),
        given[1] if len(given) > 1 else tempfile.mkdtemp(),
    )
