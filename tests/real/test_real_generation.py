"""Decoding of SmolLM2-135M on the engine: stock's tokens in fp32, stock's accuracy in bf16, and the error of quantised caches."""

from typing import Any

import pytest
import torch
from real_kit import QUESTIONS, ours, prompt_ids, stock
from transformers import AutoModelForCausalLM

from hasten.inference.decode import DecodeEngine
from hasten.state import state_of

pytestmark = pytest.mark.real

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
DIVERGENCE = {"hasten-int8": 0.0015, "hasten-fp8": 0.007}
"""Backend -> largest mean KL divergence, in nats, of the next token's distribution; measured: 0.0007 and 0.0034."""


@pytest.fixture(scope="module")
def engine() -> tuple[Any, dict[str, torch.Tensor], list[list[int]]]:
    """(the model in fp32 on the engine, the questions as a batch, each by itself)."""
    model, tokenizer = ours()
    state_of(model).engine = DecodeEngine(("cpu",))
    rows = [prompt_ids(tokenizer, question) for question, _ in QUESTIONS]
    width = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return model.eval(), {"input_ids": ids, "attention_mask": mask}, rows


def logits_along(model: Any, sequences: torch.Tensor, batch: dict[str, torch.Tensor], **asked: Any) -> torch.Tensor:
    """Logits (steps, B, V) of a model that is made to continue with these sequences."""

    def forced(row: int, ids: torch.Tensor) -> list[int]:
        return [int(sequences[row, len(ids)])]

    record = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**batch, **GREEDY, **record, **asked, prefix_allowed_tokens_fn=forced)
    assert torch.equal(found.sequences, sequences)
    return torch.stack(found.logits)


def test_fp32_tokens_are_stocks_batched_and_alone(engine: Any) -> None:
    model, batch, rows = engine
    expected = stock().generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    for index, row in enumerate(rows[:3]):
        alone = model.generate(torch.tensor([row]), **GREEDY)
        assert torch.equal(alone[0, len(row) :], expected[index, -24:])


def test_bf16_is_as_close_to_fp32_as_stock(engine: Any) -> None:
    model, batch, _ = engine
    sequences = model.generate(**batch, **GREEDY)
    exact = logits_along(model, sequences, batch)
    mine, _ = ours(dtype=torch.bfloat16)
    state_of(mine).engine = DecodeEngine(("cpu",))
    theirs = AutoModelForCausalLM.from_pretrained(mine.name_or_path, dtype=torch.bfloat16)
    errors = [float((logits_along(one.eval(), sequences, batch) - exact).norm()) for one in (mine, theirs)]
    assert 0 < errors[0] < 1.15 * errors[1]


@pytest.mark.parametrize("backend", DIVERGENCE)
def test_error_of_quantised_caches(engine: Any, backend: str) -> None:
    model, batch, _ = engine
    sequences = model.generate(**batch, **GREEDY)
    asked = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    exact, lossy = (logits_along(model, sequences, batch, **one).log_softmax(-1) for one in ({}, asked))
    divergence = float((exact.exp() * (exact - lossy)).sum(-1)[1:].mean())  # the first token's prompt is exact
    assert 1e-5 < divergence < DIVERGENCE[backend]
