"""What all overlays share: overlay_config on the class, the stock class they came from, a name that shows them."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from hasten.state import find_state


class Overlay(nn.Module):
    """Base of the overlays. Never instantiated: `patching` makes `type(stock.__name__, (overlay, stock), ...)`."""

    overlay_config: ClassVar[Any] = None
    stock_class: ClassVar[type[nn.Module]]
    runs: ClassVar[str] = ""
    packed_projections: ClassVar[tuple[str, ...]] = ()
    """Children that read one input: on a GPU their weights are laid behind each other, so that one product reads them."""

    if TYPE_CHECKING:  # the stock class's attributes, which the overlay finds on the instance

        def __getattr__(self, name: str) -> Any: ...

    def _get_name(self) -> str:
        return f"hasten:{type(self).__name__}"


def with_oom_advice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A causal LM's forward whose out-of-memory error says what would make room, where a memory policy knows."""

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
