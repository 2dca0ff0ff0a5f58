"""A causal LM whose forward stays transformers' own: hasten's methods, the length check and memory advice around it."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.overlays.base import Overlay, with_oom_advice
from hasten.overlays.head import HeadConfig
from hasten.overlays.head_inputs import check_length


class StockHeadOverlay(Overlay):
    overlay_config: ClassVar[HeadConfig]
    runs = "stock forward"

    def _get_name(self) -> str:
        """The stock name, as `HeadOverlay`'s."""
        return type(self).__name__

    @classmethod
    def members_over(cls, stock: type[nn.Module]) -> dict[str, Any]:
        """The stock forward behind a length check, under its own signature, which trainers and `generate` read."""
        return {"forward": _with_length_check(stock.forward)}


def _with_length_check(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checked_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises InputError for sequences longer than `max_seq_length`, then calls the stock forward."""
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next((one for one in given if isinstance(one, torch.Tensor) and one.ndim > 1), None)
        longest = kwargs.get("max_length_q")
        # Caches of recurrent layers have no length: `generate` checks what a prompt and its new tokens come to.
        check_length(self.overlay_config.max_seq_length, inputs, kwargs.get("position_ids"), None, longest)
        return forward(self, *args, **kwargs)

    return with_oom_advice(checked_forward)
