"""What all overlays share: overlay_config on the class, the stock class they came from, a name that shows them."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

POLICY = "_hasten_memory"
"""Where the causal LM wears its memory policy (`training.memory.policy`)."""


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
        policy = self.__dict__.get(POLICY)
        if policy is None:
            return forward(self, *args, **kwargs)
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        with policy.advising(next((tuple(t.shape[:2]) for t in given if isinstance(t, torch.Tensor)), None)):
            return forward(self, *args, **kwargs)

    return forward_with_advice
