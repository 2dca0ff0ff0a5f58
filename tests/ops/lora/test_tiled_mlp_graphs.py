"""The tiled MLP in every autograd graph: its forward hands tensors to its backward outside of autograd, which must not go wrong."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_kit import DEVICE, WIDTH, everything
from ops_kit import NORM
from product_kit import Products
from test_tiled_mlp import INNER, MLP, mlp_of
from torch.utils.checkpoint import checkpoint

from hasten.ops import NormInput, norm
from hasten.ops.lora import lora_mlp
from hasten.testing import relative_error

TILE = 4
GATE_UP = (WIDTH, 2 * INNER)


def hidden_of(rows: int, seed: int = 0) -> torch.Tensor:
    made = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE).requires_grad_()


def layer(mlp: MLP, hidden: torch.Tensor) -> torch.Tensor:
    """Pre-norm, MLP and residual add."""
    weight = torch.ones(WIDTH, device=DEVICE)
    normed = norm(hidden, weight, NORM, "triton")
    source = NormInput(hidden.detach(), weight, NORM)
    return lora_mlp(normed, mlp, "silu", hidden, source, TILE, "triton")


def gradients(mlp: MLP, out: torch.Tensor, hidden: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out.cos().sum(), [hidden, *everything(mlp)], **kwargs)


def assert_equal(found: Any, wanted: Any) -> None:
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine, right)


def assert_near(found: Any, wanted: Any) -> None:
    """A second backward computes h @ A.T from a recomputed norm: it may differ by a rounding."""
    for mine, right in zip(found, wanted, strict=True):
        assert relative_error(mine, right) < 1e-6


def node_of(out: torch.Tensor) -> Any:
    """The autograd node of the backward, which holds the `TiledCall`."""
    todo = [out.grad_fn]
    while todo:
        node: Any = todo.pop()
        if hasattr(node, "call"):
            return node
        todo += [one for one, _ in node.next_functions if one is not None]
    raise AssertionError("no node of the op")


def plainly(run: Callable[..., Any], mlp: MLP, hidden: torch.Tensor) -> Any:
    return run(mlp, hidden)


def recomputed(run: Callable[..., Any], mlp: MLP, hidden: torch.Tensor) -> Any:
    return checkpoint(run, mlp, hidden, use_reentrant=False)


def recomputed_by_reentry(run: Callable[..., Any], mlp: MLP, hidden: torch.Tensor) -> Any:
    return checkpoint(run, mlp, hidden, use_reentrant=True)


def recomputed_twice(run: Callable[..., Any], mlp: MLP, hidden: torch.Tensor) -> Any:
    return recomputed(lambda mlp, hidden: recomputed(run, mlp, hidden), mlp, hidden)


def moved(run: Callable[..., Any], mlp: MLP, hidden: torch.Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return run(mlp, hidden)


WAYS = [plainly, recomputed, recomputed_twice, moved]


def two_layers(mlp: MLP, hidden: torch.Tensor) -> torch.Tensor:
    return layer(mlp, layer(mlp, hidden))


@pytest.mark.parametrize("way", [*WAYS, recomputed_by_reentry], ids=lambda way: way.__name__)
def test_every_graph_gives_the_same(way: Any) -> None:
    found = []
    for run in (plainly, way):
        mlp, hidden = mlp_of_seed(), hidden_of(14)
        out = run(two_layers, mlp, hidden)
        out.cos().sum().backward()  # reentrant checkpointing does not support `autograd.grad`
        found.append([out, hidden.grad, *(t.grad for t in everything(mlp))])
    assert_equal(found[1], found[0])


def mlp_of_seed() -> MLP:
    torch.manual_seed(3)
    return mlp_of("lora", torch.float32)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_several_forwards_before_any_backward(way: Any) -> None:
    mlp = mlp_of_seed()
    inputs = [hidden_of(14, 1), hidden_of(9, 2)]
    alone = [gradients(mlp, layer(mlp, hidden), hidden) for hidden in inputs]
    for order in ((0, 1), (1, 0)):
        outs = [way(layer, mlp, hidden) for hidden in inputs]
        for index in order:
            assert_equal(gradients(mlp, outs[index], inputs[index]), alone[index])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_second_backward_gives_the_same(way: Any) -> None:
    mlp, hidden = mlp_of_seed(), hidden_of(14)
    out = way(layer, mlp, hidden)
    first = gradients(mlp, out, hidden, retain_graph=True)
    assert_near(gradients(mlp, out, hidden, retain_graph=True), first)
    assert_near(gradients(mlp, out, hidden), first)


@pytest.mark.parametrize("way", [plainly, recomputed], ids=lambda way: way.__name__)
def test_nothing_outlives_the_backward_while_the_loss_lives(way: Any) -> None:
    mlp, hidden = mlp_of_seed(), hidden_of(14)
    out = way(layer, mlp, hidden)
    left = [weakref.ref(one.untyped_storage()) for one in node_of(out).call.down_xa]
    assert len(left) == 4
    loss = out.cos().sum()
    loss.backward()
    assert loss.grad_fn is not None and not any(storage() is not None for storage in left)


def test_gradients_of_some_and_then_of_the_others() -> None:
    mlp, hidden = mlp_of_seed(), hidden_of(14)
    right = gradients(mlp, layer(mlp, hidden), hidden)
    out = layer(mlp, hidden)
    loss = out.cos().sum()
    of_hidden = torch.autograd.grad(loss, [hidden], retain_graph=True)
    assert_near([*of_hidden, *torch.autograd.grad(loss, everything(mlp))], right)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("where", [GATE_UP, (INNER, WIDTH)], ids=["gate and up", "down"])
def test_after_a_forward_that_fails_the_next_one_is_right(way: Any, where: tuple[int, int]) -> None:
    mlp, hidden = mlp_of_seed(), hidden_of(14)
    right = gradients(mlp, layer(mlp, hidden), hidden)
    with Products(fail=(*where, 2)), pytest.raises(torch.OutOfMemoryError):
        way(layer, mlp, hidden)
    assert_equal(gradients(mlp, way(layer, mlp, hidden), hidden), right)


def test_a_backward_that_fails_in_the_middle_can_run_again() -> None:
    mlp, hidden = mlp_of_seed(), hidden_of(14)
    right = gradients(mlp, layer(mlp, hidden), hidden)
    out = layer(mlp, hidden)
    with Products(fail=(*GATE_UP, 2)), pytest.raises(torch.OutOfMemoryError):
        gradients(mlp, out, hidden, retain_graph=True)
    assert_near(gradients(mlp, out, hidden), right)
