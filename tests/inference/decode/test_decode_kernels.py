"""The engine with the kernels that a GPU runs, in Triton's interpreter: padded rows, windows, several new tokens."""

from typing import Any

import pytest
import torch
from decode_kit import engine_note, prompts, served
from device_kit import DEVICE
from transformers import DynamicCache

from hasten.ops import decode_attention
from hasten.ops.decode_attention.kernels import attend, new_token
from hasten.overlays.cache_name import CACHE

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 2}


@pytest.mark.usefixtures("kernels")
def test_tokens_are_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ragged batch of three in a bucket of four, then a second turn of 20 tokens."""
    widths: list[int] = []
    kernel = attend.decode_attention

    def spy(q_BTHD: torch.Tensor, *args: Any) -> torch.Tensor:
        widths.append(q_BTHD.shape[1])
        return kernel(q_BTHD, *args)

    one, fused = new_token.attend_new_token, []
    monkeypatch.setattr(attend, "decode_attention", spy)
    monkeypatch.setattr(new_token, "attend_new_token", lambda *args: fused.append(args) or one(*args))
    stock, ours = served("gemma2", num_hidden_layers=2)
    batch = prompts()
    turn = torch.randint(6, 280, (3, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for model in (stock, ours):
        cache = DynamicCache(config=model.config)
        first = model.generate(**batch, **GREEDY, **{CACHE: cache})
        ids = torch.cat((first, turn), dim=1)
        mask = torch.ones_like(ids)
        mask[:, :11] = batch["attention_mask"]
        results.append(model.generate(ids, attention_mask=mask, **GREEDY, **{CACHE: cache}))
    assert torch.equal(*results) and engine_note(ours) == "engine: hasten"
    assert set(widths) == {5, decode_attention.MAX_NEW_TOKENS} and fused
