"""Classes that others put over or under overlays: FSDP2's, parametrize's, hand-made ones survive apply and restore."""

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_kit import DEVICE
from torch import nn
from torch.nn.utils import parametrize
from transformers_kit import recompute

from hasten.errors import PatchError
from hasten.overlays import LayerOverlay, MLPOverlay, NormOverlay, Overlay
from hasten.patching import apply, is_patched, report, restore
from hasten.patching.apply import reconfigure
from hasten.patching.classes import stock_class
from hasten.testing import relative_error, tiny_model

IDS = torch.arange(6, 30)[None]


def twins(name: str = "llama") -> tuple[Any, Any, torch.Tensor]:
    """(a model to change, a stock copy, the stock logits)."""
    model = tiny_model(name)
    stock = copy.deepcopy(model)
    return model, stock, stock(IDS).logits


def log_calls(module: Any, calls: list[str]) -> None:
    """Puts a subclass over the module's class, with a forward that calls `super()`, a property and a class method."""

    class Logged(type(module)):
        prefix = "called"

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.label)
            return super().forward(*args, **kwargs)

        @property
        def label(self) -> str:
            return f"{self.describe()} {super()._get_name()}"

        @classmethod
        def describe(cls) -> str:
            return f"{cls.prefix} {cls.__name__}"

    module.__class__ = Logged


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@pytest.mark.parametrize("path", ["model.norm", "model.layers.1", "model.layers.1.mlp", "model.layers.1.self_attn"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_subclass_with_its_own_forward_stays_over_the_overlay(path: str, first: str) -> None:
    model, stock, logits = twins()
    calls: list[str] = []
    module = model.get_submodule(path)
    if first == "ours":
        apply(model)
    log_calls(module, calls)
    for _ in range(2):
        apply(model)
        assert type(module).__name__ == "Logged" and isinstance(module, Overlay)
        assert stock_class(module) is type(stock.get_submodule(path))
        torch.testing.assert_close(model(IDS).logits, logits)
        assert calls == [f"called Logged hasten:{type(module).__name__}"]
        calls.clear()
        restore(model)
        assert type(module).__name__ == "Logged" and not is_patched(model)
        assert type(module).__mro__[1] is type(stock.get_submodule(path))
        torch.testing.assert_close(model(IDS).logits, logits)
        assert calls == ["called Logged Logged"]
        calls.clear()


@pytest.mark.parametrize("path", ["model.layers.1.mlp", "model.layers.1.self_attn", "model.layers.1.input_layernorm"])
def test_the_fused_layer_calls_their_forward(path: str, kernels: None) -> None:
    """The fused residual adds would bypass a forward that is over an overlay's own."""
    model, _, logits = twins()
    calls: list[str] = []
    apply(model)
    log_calls(model.get_submodule(path), calls)
    model.to(DEVICE)
    with torch.no_grad():
        assert relative_error(model(IDS.to(DEVICE)).logits.cpu(), logits) < 2e-5
    assert len(calls) == 1


def test_a_layer_under_another_class_checkpoints_once() -> None:
    model, _, _ = twins()
    calls: list[str] = []
    apply(model)
    log_calls(model.model.layers[0], calls)
    restore(model)
    apply(model)
    recompute(model.train(), use_reentrant=False)
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2  # the forward and its recompute


def test_reconfigure_keeps_their_class_and_our_methods() -> None:
    class Methods:
        def hello(self) -> str:
            return "hello"

    model, _, logits = twins()
    apply(model, methods=Methods)
    mlp = model.model.layers[0].mlp
    calls: list[str] = []
    log_calls(mlp, calls)
    log_calls(model, [])
    reconfigure(mlp, tile_rows=5)
    reconfigure(model, max_seq_length=50)
    assert mlp.overlay_config.tile_rows == 5 and model.overlay_config.max_seq_length == 50
    assert model.hello() == "hello" and type(model).__name__ == type(mlp).__name__ == "Logged"
    torch.testing.assert_close(model(IDS).logits, logits)
    assert calls
    apply(model)
    assert model.hello() == "hello" and mlp.overlay_config.tile_rows is None


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_parametrize_over_and_under(first: str) -> None:
    model, stock, _ = twins()
    for one in (model, stock):
        if one is model and first == "ours":
            apply(model)
        parametrize.register_parametrization(one.model.norm, "weight", Doubled(), unsafe=True)
    logits = stock(IDS).logits
    norm = model.model.norm
    for _ in range(2):
        apply(model)
        assert isinstance(norm, NormOverlay) and parametrize.is_parametrized(norm, "weight")
        torch.testing.assert_close(model(IDS).logits, logits)
        restore(model)
        assert not isinstance(norm, NormOverlay) and type(norm).__name__ == "ParametrizedLlamaRMSNorm"
        torch.testing.assert_close(model(IDS).logits, logits)
    apply(model)
    parametrize.remove_parametrizations(norm, "weight", leave_parametrized=True)
    assert isinstance(norm, NormOverlay) and type(norm).__name__ == "LlamaRMSNorm"
    torch.testing.assert_close(model(IDS).logits, logits)
    restore(model)
    assert type(norm) is type(stock.model.layers[0].input_layernorm)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo by file")
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_fsdp2_over_and_under(first: str, one_process: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, stock, _ = twins()
    stock.train()
    stock(IDS, labels=IDS).loss.backward()
    if first == "ours":
        apply(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(model, mesh=one_process)
    sharded = [model, *model.model.layers]
    for _ in range(2):
        planned = apply(model)
        assert not planned.skips and sum(isinstance(m, LayerOverlay) for m in model.modules()) == 4
        assert all(isinstance(m, FSDPModule) and isinstance(m, Overlay) for m in sharded)
        assert type(model.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
        assert "decoder layer overlay" in str(report(model))
        model.train()
        model(IDS, labels=IDS).loss.backward()
        for name, parameter in model.named_parameters():
            grad: Any = parameter.grad
            assert relative_error(grad.full_tensor(), stock.get_parameter(name).grad) < 1e-5, name  # pyright: ignore[reportArgumentType]
        model.zero_grad()  # before a forward without a backward, after which FSDP2 leaves the root unsharded
        restore(model)
        assert not is_patched(model) and all(isinstance(m, FSDPModule) for m in sharded)
        assert [stock_class(m) for m in sharded] == [type(stock), *map(type, stock.model.layers)]
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(IDS).logits, stock.eval()(IDS).logits)


def test_a_decorated_method_finds_its_new_class() -> None:
    def twice(function: Any) -> Any:
        @functools.wraps(function)
        def call(self: Any, x: torch.Tensor) -> torch.Tensor:
            return function(self, x) * 2

        return call

    model, _, _ = twins()
    apply(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 64)
    expected = mlp(x) * 2

    class Twice(type(mlp)):
        @twice
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    mlp.__class__ = Twice
    restore(model)
    assert not isinstance(mlp, MLPOverlay)
    torch.testing.assert_close(mlp(x), expected)


def test_a_class_that_cannot_be_rebuilt_is_named_and_nothing_changes() -> None:
    model, _, _ = twins()
    apply(model)

    class Once(type(model.model.layers[3].self_attn)):
        def __init_subclass__(cls, *, reason: str) -> None:
            super().__init_subclass__()

    class Inner(Once, reason="of its own"):
        pass

    attention = model.model.layers[3].self_attn
    attention.__class__ = Inner
    before = [type(module) for module in model.modules()]
    for change in (lambda: restore(model), lambda: reconfigure(attention, window=4)):
        with pytest.raises(PatchError, match="Inner.*put over LlamaAttention"):
            change()
        assert [type(module) for module in model.modules()] == before
