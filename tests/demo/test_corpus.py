"""Facts of the standard library: true, distinct, the same every time, and split without leaks."""

import importlib
import inspect
import os
import subprocess
import sys

from hasten.demo.base import EOS, train_tokenizer
from hasten.demo.corpus import LONGEST, MODULES, SHORTEST, build, read_facts


def test_answers_are_the_documented_first_sentences() -> None:
    facts = {fact.name: fact for fact in read_facts(["os.path", "json", "math"])}
    assert facts["os.path.join"].answer.startswith("Join two or more pathname components")
    for name in ("math.sqrt", "json.dumps"):
        module, attribute = name.split(".")
        text = " ".join(inspect.cleandoc(getattr(importlib.import_module(module), attribute).__doc__).split())
        assert text.startswith(facts[name].answer)


def test_there_are_many_facts_and_each_answer_is_there_once() -> None:
    facts = read_facts(MODULES)
    assert len(facts) > 1000
    assert len({fact.answer for fact in facts}) == len({fact.name for fact in facts}) == len(facts)
    assert all(SHORTEST <= len(fact.answer) <= LONGEST for fact in facts)


def test_splits_do_not_leak() -> None:
    corpus = build(300)
    taught = {question.name for question in corpus.train}
    asked = {question.question for question in corpus.train}
    assert corpus.untaught and not {question.name for question in corpus.untaught} & taught
    assert corpus.reworded and {question.name for question in corpus.reworded} <= taught
    assert not {question.question for question in (*corpus.reworded, *corpus.untaught)} & asked
    assert len(asked) == len(corpus.train)


def test_every_process_builds_the_same_corpus_and_reading_it_does_nothing_else() -> None:
    script = (
        "import hashlib, sys; from hasten.demo.corpus import build; corpus = build(200)\n"
        "sys.stdout.write(hashlib.sha256(repr(corpus).encode()).hexdigest())"
    )
    seeds = [
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert seeds[0].stdout == seeds[1].stdout and len(seeds[0].stdout) == 64
    assert not seeds[0].stderr


def test_the_tokenizer_loses_nothing_and_marks_answers() -> None:
    corpus = build(40)
    tokenizer = train_tokenizer(corpus.documents, 600)
    for text in ("os.path.join(a, *p)", "naïve ☃\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    question = corpus.train[0]
    row = tokenizer.apply_chat_template(
        question.messages(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [i for i, bit in zip(row["input_ids"], row["assistant_masks"], strict=True) if bit]
    assert tokenizer.decode(learned) == question.answer + EOS
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
