"""Defines the base of all overlays: config on the class, the stock class as parent, a name for `print(model)`."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from hasten.state import find_state


class Overlay(nn.Module):
    """Base of the overlays. Never instantiated: `patching` makes `type(stock.__name__, (overlay, stock), ...)`.

    overlay_config: a frozen dataclass. stock_class: transformers' class. runs: what the report calls it.
    packed_projections: children with the same input; on a GPU their weights are packed, so that one matmul reads them.
    """

    overlay_config: ClassVar[Any] = None
    stock_class: ClassVar[type[nn.Module]]
    runs: ClassVar[str] = ""
    packed_projections: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def members_over(cls, stock: type[nn.Module]) -> dict[str, Any]:
        """Further members of the class that `patching` makes over `stock`, for an overlay that wraps the stock forward."""
        return {}

    if TYPE_CHECKING:  # attributes of the stock class

        def __getattr__(self, name: str) -> Any: ...

    def _get_name(self) -> str:
        return f"hasten:{type(self).__name__}"


def runs_overlay(module: nn.Module, overlay: type[Overlay]) -> bool:
    """Returns whether calling `module` runs `overlay.forward`, i.e. no class with another forward was put over it."""
    return isinstance(module, overlay) and type(module).forward is overlay.forward


def with_oom_advice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a causal LM's forward: with a memory policy, its out-of-memory error says what would free memory."""

    @functools.wraps(forward)
    def forward_with_advice(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = find_state(self)
        if state is None or state.memory is None:
            return forward(self, *args, **kwargs)
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        shapes = ((t.shape[0], t.shape[1]) for t in given if isinstance(t, torch.Tensor))
        with state.memory.advising(next(shapes, None)):
            outputs = forward(self, *args, **kwargs)
        state.memory.watch_backward(outputs)
        return outputs

    return forward_with_advice
