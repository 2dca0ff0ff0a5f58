"""Chooses the engine that `model.generate` calls. One file per engine; `engine_of(model)` is the one in use.

At present only `StockEngine`: transformers' `generate` behind a length check and left-padding. A decode engine of
hasten's own, or vLLM's, implements the same `hasten.state.Engine` and is set as `state_of(model).engine`.
"""

from typing import Any

from hasten.inference.generate import generate
from hasten.options import LoadOptions
from hasten.state import Engine, GenerateCall, find_state


class StockEngine:
    """transformers' `generate`: greedy, sampling, beams, assistants, streamers and caches are transformers' own."""

    name = "transformers"

    def check(self, options: LoadOptions) -> list[str]:
        """Returns no problems: it runs every model that transformers runs."""
        return []

    def generate(self, model: Any, call: GenerateCall) -> Any:
        """Returns what transformers' `generate` returns. Raises InputError, see `inference.generate`."""
        return generate(model, call.stock, *call.args, **call.kwargs)


STOCK = StockEngine()


def engine_of(model: Any) -> Engine:
    """Returns the engine chosen for the model, else `StockEngine`."""
    state = find_state(model)
    return STOCK if state is None or state.engine is None else state.engine
