"""The MLP by tiles on the path that GPUs take, in whole models: loss and gradients, what is kept, what is made again."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from kernels_kit import lora
from product_kit import Products

from hasten.patching import apply
from hasten.testing import relative_error, tiny_model
from hasten.testing.quantize import quantize_linears
from hasten.training import checkpointing, tiling

IDS = torch.randint(6, 288, (2, 11), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(11) < 4, -100)
TILE = 8  # 22 rows: two tiles and a ragged one


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS.to(DEVICE), labels=LABELS.to(DEVICE)).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.grid(1)
@pytest.mark.parametrize("way", ["lora", "nf4", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_loss_and_gradients(name: str, way: str, kernels: None) -> None:
    """And how often a tile's products are made: a layer that is recomputed makes them no more often, unless a norm behind the
    MLP needs its output."""
    whole = tiny_model(name, num_hidden_layers=2, intermediate_size=192).to(DEVICE)
    gate_up = (64, 2 * 192)
    whole = quantize_linears(whole) if way == "nf4" else whole
    apply(whole)
    whole = (whole if way == "full" else lora(whole)).train()
    by_tiles = copy.deepcopy(whole)
    assert tiling.set_tile(by_tiles, TILE) == 2
    with Products() as products:
        loss, gradients = step(whole)
    assert products.rows(*gate_up) == [22] * 2
    for mode in (False, True):
        checkpointing.enable(by_tiles, mode)
        with Products() as products:
            loss_by_tiles, found = step(by_tiles)
        assert relative_error(loss_by_tiles, loss) < 1e-6 and found.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            assert relative_error(found[parameter], gradient) < 1e-4, parameter
        passes = 3 if mode and name == "gemma2" else 2
        assert sorted(products.rows(*gate_up)) == sorted([8, 8, 6] * 2 * passes)


def test_a_layer_keeps_nothing_as_wide_as_the_mlp(kernels: None) -> None:
    kept: dict[int | None, int] = {}
    for tile in (None, TILE):
        model = tiny_model("llama", num_hidden_layers=2, intermediate_size=512)
        apply(model)
        model = lora(model, r=1).to(DEVICE).train()
        tiling.set_tile(model, tile)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(remember, alive), lambda t: t):
            model(input_ids=IDS.to(DEVICE), labels=LABELS.to(DEVICE))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
        kept[tile] = sum(size for storage, size in storages.items() if storage not in own)
    gate_and_up = 2 * IDS.numel() * 2 * 512 * 4  # layers, rows, channels, bytes
    assert kept[None] - kept[TILE] >= gate_and_up


def remember(alive: list[torch.Tensor], saved: torch.Tensor) -> torch.Tensor:
    alive.append(saved)
    return saved
