"""QLoRA with TRL's SFTTrainer: a 4-bit base, a LoRA on every linear layer, loss on the assistant's turns only.

Usage: python qlora_sft.py [CHECKPOINT [OUTPUT]]      (without them: a tiny random model, a temporary folder)
"""

import sys
import tempfile

from datasets import Dataset
from trl import SFTTrainer

from hasten import FastLanguageModel, check_dataset, report, sft_config
from hasten.testing import save_tiny


def chat(number: int) -> dict:
    """One conversation of the training set."""
    question, answer = f"What is {number} plus {number}?", f"{number} plus {number} is {number + number}."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main(checkpoint: str, output: str) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=256, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    print(report(model))

    args = sft_config(
        model,
        output_dir=output,
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        assistant_only_loss=True,
        logging_steps=1,
        report_to="none",
    )
    dataset = Dataset.from_list([chat(number) for number in range(200)])
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=args)
    print(check_dataset(dataset, trainer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(output)  # the adapter, as PEFT writes it
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else str(save_tiny(tempfile.mkdtemp(), amplify=1.0)),
        given[1] if len(given) > 1 else tempfile.mkdtemp(),
    )
