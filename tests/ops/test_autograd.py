"""Autograd Functions without gradients: the same results, through the forward alone."""

from typing import Any, ClassVar

import pytest
import torch

from hasten.ops.autograd import run


class Doubled(torch.autograd.Function):
    """Keeps its contexts."""

    contexts: ClassVar[list[Any]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        Doubled.contexts.append(ctx)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


def test_with_gradients_it_is_apply() -> None:
    x = torch.randn(3, requires_grad=True)
    run(Doubled, x, 2.0).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(mode: Any) -> None:
    Doubled.contexts.clear()
    x = torch.randn(3, requires_grad=True)
    with mode():
        y = run(Doubled, x, 2.0)
    assert torch.equal(y, x.detach() * 2.0) and not y.requires_grad
    assert not hasattr(Doubled.contexts[0], "saved_tensors")
