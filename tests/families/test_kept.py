"""What a layer keeps for its backward on the fused path, against the least that it must (docs/training.md)."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from kernels_kit import lora

from hasten.patching import apply
from hasten.testing import tiny_model


def least_bytes(config: Any, layers: int, tokens: int, itemsize: int) -> int:
    """The stream twice, q, k and v, what attention gave, gate and up: what takes a product or attention to make again."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = 2 * config.hidden_size + (heads + 2 * kv) * dim + heads * dim + 2 * config.intermediate_size
    return layers * tokens * itemsize * values


def remember(alive: list[torch.Tensor], saved: torch.Tensor) -> torch.Tensor:
    alive.append(saved)
    return saved


@pytest.mark.parametrize("adapt", [pytest.param(True, marks=pytest.mark.full), False])
def test_a_layer_keeps_little_more_than_it_must(adapt: bool, kernels: None) -> None:
    changes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    kept: dict[int, dict[int, int]] = {}
    for layers in (1, 3):
        model = tiny_model("llama", num_hidden_layers=layers, **changes)
        apply(model)
        model = (lora(model, r=1) if adapt else model).to(DEVICE).train()
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        ids = torch.randint(6, 288, (2, 40), device=DEVICE)
        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, alive), lambda t: t):
            loss = model(input_ids=ids, labels=ids).loss
        kept[layers] = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in alive
            if t.untyped_storage().data_ptr() not in own
        }
        config = copy.deepcopy(model.config)
        del loss
    two_layers = sum(kept[3].values()) - sum(kept[1].values())
    least = least_bytes(config, 2, 80, 4)
    assert least <= two_layers < 1.06 * least
