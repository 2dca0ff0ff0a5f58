"""Hooks on parts of PEFT's wrappers, where a kernel would compute the LoRA without calling them."""

from typing import Any

import pytest
import torch
from device_kit import DEVICE, GRADIENTS, LOGITS, ON_GPU, assert_near
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from hasten.patching import apply
from hasten.testing import relative_error, tiny_model

IDS = torch.tensor([[7, 8, 9, 10, 11, 12]], device=DEVICE)


def _adapted(patched: bool, **changes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = tiny_model("llama", amplify=2.0, num_hidden_layers=1).to(DEVICE)
    if patched:
        apply(model)
    config = {"r": 4, "target_modules": ["q_proj", "o_proj", "gate_proj"], **changes}
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **config))
    return adapted.train()


def _watch(module: nn.Module) -> list[int]:
    seen: list[int] = []

    def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape[-1])
        return output * torch.linspace(0.1, 1.0, output.shape[-1], device=output.device)

    module.register_forward_hook(hook)
    return seen


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def _compare(part: str, **changes: Any) -> None:
    found, calls = [], []
    for patched in (True, False):
        model = _adapted(patched, **changes)
        (name,) = [n for n, _ in model.named_modules() if n.endswith(part)]
        calls.append(_watch(model.get_submodule(name)))
        found.append(_gradients(model))
    assert calls[0] == calls[1] and calls[0], part
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) < GRADIENTS, (part, name)


@pytest.mark.parametrize("projection", ["q_proj", "o_proj", "gate_proj"])
@pytest.mark.parametrize("part", ["", ".base_layer", ".lora_A.default", ".lora_B.default", ".lora_dropout.default"])
def test_every_part_of_a_lora_may_be_watched(projection: str, part: str, kernels: None) -> None:
    _compare(projection + part)


@pytest.mark.parametrize("part", ["lm_head", "lm_head.modules_to_save.default", "lm_head.original_module"])
def test_every_part_of_a_trained_head_may_be_watched(part: str, kernels: None) -> None:
    if part.endswith("original_module"):  # not called while the copy is active
        model = _adapted(True, modules_to_save=["lm_head"])
        seen = _watch(model.get_submodule(f"base_model.model.{part}"))
        _gradients(model)
        assert not seen
    else:
        _compare(part, modules_to_save=["lm_head"])


@pytest.mark.parametrize("part", ["lm_head", "lm_head.base_layer", "lm_head.lora_B.default"])
def test_every_part_of_a_lora_on_the_head_may_be_watched(part: str, kernels: None) -> None:
    _compare(part, target_modules=["lm_head"])


def test_a_subclass_of_pefts_layer_runs_its_own_forward(kernels: None) -> None:
    found = []
    for patched in (True, False):
        model = _adapted(patched)
        layer: Any = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
        stock = type(layer)

        class Doubled(stock):
            def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                return super().forward(x, *args, **kwargs) * 2

        layer.__class__ = Doubled
        found.append(_gradients(model)["loss"])
    assert relative_error(*found) < (LOGITS if ON_GPU else 1e-6)


def test_a_replaced_forward_of_pefts_class_counts(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, calls = lora.Linear.forward, []

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return stock(self, x, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", forward)
    for patched in (True, False):
        calls.clear()
        _gradients(_adapted(patched))
        assert len(calls) == 3


def test_dropout_that_is_active_in_evaluation_counts(kernels: None) -> None:
    """Monte Carlo dropout: the model is in evaluation mode, its dropout is not."""
    found = []
    for patched in (True, False):
        model = _adapted(patched, lora_dropout=0.5).eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(model(input_ids=IDS, use_cache=False).logits)
    assert_near(*found)
