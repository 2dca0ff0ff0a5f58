"""SmolLM2-135M-Instruct with and without hasten, in fp32 on the CPU, and a few short chats to train it on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten import FastLanguageModel

FOLDER = Path(__file__).parents[2] / "build/smollm2"
QUESTIONS = (
    ("What is the capital of France?", "It is Paris, on the Seine."),
    ("Name a prime number above ten.", "Eleven."),
    ("Which planet is the largest?", "Jupiter, by mass and by size."),
    ("Translate 'good morning' into German.", "Guten Morgen."),
    ("How many legs does a spider have?", "Eight, as all arachnids."),
    ("Who wrote Hamlet?", "William Shakespeare."),
    ("What is ice made of?", "Frozen water."),
    ("Give an antonym of 'narrow'.", "Wide."),
)


def folder() -> str:
    """The checkpoint that `make test-real` writes once."""
    if not (FOLDER / "config.json").is_file():
        pytest.fail(f"{FOLDER} holds no model; `make test-real` writes it")
    return str(FOLDER)


def ours(name: str | Path | None = None, **options: Any) -> tuple[Any, Any]:
    """(hasten's model, tokenizer)."""
    options = {"load_in_4bit": False, "dtype": torch.float32, "max_seq_length": 256, **options}
    return FastLanguageModel.from_pretrained(str(name or folder()), **options)


def stock(name: str | Path | None = None, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(name or folder()), dtype=torch.float32, **options).eval()


def stock_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(folder())


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    said = [{"role": "user", "content": question}]
    return said if answer is None else [*said, {"role": "assistant", "content": answer}]


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    rendered = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def rows() -> Dataset:
    """One tokenised example per question; only the answer has labels."""
    tokenizer = stock_tokenizer()
    made = []
    for question, answer in QUESTIONS:
        prompt = prompt_ids(tokenizer, question)
        ids = prompt + tokenizer(f"{answer}<|im_end|>\n", add_special_tokens=False).input_ids
        made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return Dataset.from_list(made)


def batch(count: int = 3) -> dict[str, torch.Tensor]:
    """The first examples, padded on the right."""
    examples = [rows()[index] for index in range(count)]
    width = max(len(one["input_ids"]) for one in examples)
    filled = {"input_ids": 2, "labels": -100}
    made = {
        name: torch.tensor([one[name] + [fill] * (width - len(one[name])) for one in examples])
        for name, fill in filled.items()
    }
    made["attention_mask"] = torch.tensor(
        [[1] * len(one["input_ids"]) + [0] * (width - len(one["input_ids"])) for one in examples]
    )
    return made
