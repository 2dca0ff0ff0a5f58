"""The engine with the kernels that a GPU runs, in Triton's interpreter: padded rows, windows, several new tokens."""

from typing import Any

import pytest
import torch
from decode_kit import engine_note, prompts, served
from device_kit import DEVICE
from product_kit import launches
from transformers import DynamicCache

from hasten.ops.decode_attention import MAX_NEW_TOKENS
from hasten.overlays.cache_name import CACHE

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 2}


@pytest.mark.usefixtures("kernels")
def test_tokens_are_stocks() -> None:
    """A ragged batch of three in a bucket of four, then a second turn of 17 tokens."""
    stock, ours = served("gemma2", num_hidden_layers=1)
    batch = prompts()
    turn = torch.randint(6, 280, (3, 17), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        with launches() as launched:
            first = model.generate(**batch, **GREEDY, **{CACHE: cache})
            ids = torch.cat((first, turn), dim=1)
            mask = torch.ones_like(ids)
            mask[:, :11] = batch["attention_mask"]
            results.append(model.generate(ids, attention_mask=mask, **GREEDY, **{CACHE: cache}))
    assert torch.equal(*results) and engine_note(ours) == "engine: hasten"
    # The turn, with the one token that the cache lacks, in two parts; then single tokens.
    assert {one.shapes[0][1] for one in launched if one.kernel == "_attend"} == {2, MAX_NEW_TOKENS}
    assert any(one.kernel == "_new_token" for one in launched)
