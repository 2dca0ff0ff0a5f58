"""Evaluates a model on questions: loss on the documented answers, and exact matches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hasten.data import IGNORE_INDEX
from hasten.demo.corpus import Question

BATCH = 32
LONGEST_ANSWER = 48
"""Tokens. The longest answers of the dataset (100 characters) take about 40."""


@dataclass(frozen=True)
class Score:
    """loss: nats per token of the documented answers. exact: how many of `total` generated answers equal theirs."""

    loss: float
    exact: int
    total: int
    answers: tuple[str, ...]


def score(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Score:
    """Answers every question by greedy decoding and scores the answers. The model must be in inference mode."""
    answers = tuple(answer for batch in _batches(questions) for answer in _answer(model, tokenizer, batch))
    exact = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    return Score(answer_loss(model, tokenizer, questions), exact, len(questions), answers)


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Returns the mean negative log-likelihood, in nats per token, of answers and end-of-turn tokens given the
    questions."""
    total, count = 0.0, 0
    for batch in _batches(questions):
        inputs = encode(tokenizer, batch)
        learned = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += float(model(**inputs).loss) * learned
        count += learned
    return total / count


def encode(tokenizer: Any, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """Encodes to input_ids, attention_mask, labels: (B, T) int64, right-padded. Labels on the answers' tokens only."""
    rows = [
        tokenizer.apply_chat_template(q.messages(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        for q in questions
    ]
    longest = max(len(row["input_ids"]) for row in rows)
    filled: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids, padding = row["input_ids"], longest - len(row["input_ids"])
        labels = [token if bit else IGNORE_INDEX for token, bit in zip(ids, row["assistant_masks"], strict=True)]
        filled["input_ids"].append(ids + [tokenizer.pad_token_id] * padding)
        filled["attention_mask"].append([1] * len(ids) + [0] * padding)
        filled["labels"].append(labels + [IGNORE_INDEX] * padding)
    return {name: torch.tensor(values) for name, values in filled.items()}


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    inputs = tokenizer.apply_chat_template(
        [q.messages()[:1] for q in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
    )
    width = inputs["input_ids"].shape[1]
    return [text.strip() for text in tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)]


def _batches(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), BATCH):
        yield questions[start : start + BATCH]
