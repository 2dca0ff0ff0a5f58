"""Chooses the engine that `model.generate` calls: `DecodeEngine` for a model on a GPU, else `StockEngine`.

`StockEngine` is transformers' `generate` behind a length check and left-padding. Another engine (vLLM's) implements the same
`hasten.state.Engine` and is set as `state_of(model).engine`.
"""

from typing import Any

import torch

from hasten.inference.decode import DecodeEngine
from hasten.inference.generate import generate
from hasten.options import LoadOptions
from hasten.state import Engine, GenerateCall, causal_lm_of, find_state


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


DECODED = ("cuda",)
"""Kinds of devices on which a model gets a `DecodeEngine` of its own."""


def engine_of(model: Any) -> Engine:
    """Returns the engine that was chosen for the model. Without one, chooses a `DecodeEngine` for a model on a GPU or with
    `float8_kv_cache`, which stays with the model; elsewhere `StockEngine`."""
    state = find_state(model)
    if state is None:
        return STOCK
    if state.engine is None:
        kind = causal_lm_of(model).device.type
        in_fp8 = state.load_options is not None and state.load_options.float8_kv_cache is True
        if in_fp8 or kind in DECODED:
            state.engine = DecodeEngine({*DECODED, kind}, cache=torch.float8_e4m3fn if in_fp8 else None)
    return STOCK if state.engine is None else state.engine
