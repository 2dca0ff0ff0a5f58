"""The key-value cache is exact: prompt and single steps give the logits of one whole forward."""

from typing import Any

import pytest
import torch
from support import padded, prompts, twins
from transformers import DynamicCache

from hasten.overlays.cache_name import CACHE
from hasten.testing.tiny import FAMILY_CONFIGS

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.7 * i for i in range(8)],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def stepwise(model: Any, ids: torch.Tensor, mask: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits (B, T, V) from a prefill of that many positions and single steps after it."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    parts = []
    edges = [0, prefill, *range(prefill + 1, ids.shape[1] + 1)]
    for start, stop in zip(edges, edges[1:], strict=False):
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            **{CACHE: cache},
            use_cache=True,
        )
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_prefill_and_decode_equal_the_whole_forward(model_type: str) -> None:
    """Rows of up to 20 tokens over windows of 8, padded on the left; the prefill ends before and after the window."""
    ours, _ = twins(model_type)
    ids, mask = padded(prompts(), "left")
    with torch.no_grad():
        whole = ours(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    for prefill in (5, 13):
        steps = stepwise(ours, ids, mask, prefill)
        read = mask.bool()
        assert relative_error(steps[read], whole[read]) <= 2e-5


@pytest.mark.parametrize("rope", ROPES)
def test_crossing_the_context_limit_equals_stock(rope: str) -> None:
    """A prompt below the checkpoint's context of 16, generated on to 40: tokens equal, logits to rounding."""
    ours, stock = twins(
        "llama", max_position_embeddings=16, rope_parameters={"rope_theta": 10000.0, **ROPES[rope]}, max_seq_length=40
    )
    row = prompts(3)[2][None]
    how = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    got = ours.generate(row, max_new_tokens=40 - row.shape[1], **how)
    wanted = stock.generate(row, max_new_tokens=40 - row.shape[1], **how)
    assert torch.equal(got.sequences, wanted.sequences) and got.sequences.shape[1] == 40
    for ours_logits, stock_logits in zip(got.logits, wanted.logits, strict=True):
        assert relative_error(ours_logits, stock_logits) <= 2e-5


def test_the_rope_types_differ() -> None:
    """Otherwise the test above would compare five times the same."""
    row = prompts(3)[2][None]
    results = set()
    for rope in ROPES.values():
        ours, _ = twins("llama", max_position_embeddings=16, rope_parameters={"rope_theta": 10000.0, **rope})
        results.add(tuple(ours.generate(row, max_new_tokens=31, do_sample=False, eos_token_id=None)[0].tolist()))
    assert len(results) == len(ROPES)
