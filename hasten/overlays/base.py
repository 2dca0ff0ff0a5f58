"""Defines the base of all overlays: config on the class, the stock class as parent, a name for `print(model)`."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from hasten.state import find_state


class Overlay(nn.Module):
    """Base of the overlays. Never instantiated: `patching` makes `type(stock.__name__, (overlay, stock), ...)`.

    overlay_config: a frozen dataclass. stock_class: transformers' class. stock_arguments: names of the positional
    arguments of its forward, in order, without self. overlay_forward: the forward of this class, with the stock
    signature. runs: what the report calls it. packed_projections: children with the same input; on a GPU their weights are packed, so that one matmul reads them.
    """

    overlay_config: ClassVar[Any] = None
    stock_class: ClassVar[type[nn.Module]]
    stock_arguments: ClassVar[tuple[str, ...]] = ()
    overlay_forward: ClassVar[Callable[..., Any]]
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

    def moved_config(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Returns the config that holds after `module.to`, `half`, ... (torch's `_apply(fn)`)."""
        return self.overlay_config

    def stock_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of the stock class."""
        return self.stock_class.forward(self, *args, **kwargs)  # pyright: ignore[reportCallIssue]


def runs_overlay(module: nn.Module, overlay: type[Overlay]) -> bool:
    """Returns whether the class of `module` runs `overlay.forward`, i.e. no class with another forward or `__call__` was
    put over it."""
    if not isinstance(module, overlay):
        return False
    kind = type(module)
    return kind.forward is kind.overlay_forward and kind.__call__ is nn.Module.__call__


def by_name(module: Overlay, args: tuple[Any, ...], kwargs: dict[str, Any], given: int = 0) -> dict[str, Any]:
    """Returns positional arguments of the stock forward as keyword arguments, together with `kwargs`.

    args: without the first `given` ones. Raises TypeError, as Python does, for one argument too many or given twice.
    """
    names = module.stock_arguments[given:]
    if len(args) > len(names):
        most, found = len(names) + given + 1, len(args) + given + 1
        raise TypeError(f"forward() takes up to {most} positional arguments but {found} were given")
    for name in names[: len(args)]:
        if name in kwargs:
            raise TypeError(f"forward() got multiple values for argument {name!r}")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def with_oom_advice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a causal LM's forward: with a memory policy, its out-of-memory error says what would free memory."""

    @functools.wraps(forward)
    def forward_with_advice(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = None if torch.compiler.is_compiling() else find_state(self)
        if state is None or state.memory is None:
            return forward(self, *args, **kwargs)
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        shapes = ((t.shape[0], t.shape[1]) for t in given if isinstance(t, torch.Tensor))
        with state.memory.advising(next(shapes, None)):
            outputs = forward(self, *args, **kwargs)
        state.memory.watch_backward(outputs)
        return outputs

    return forward_with_advice
