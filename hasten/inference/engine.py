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

    def check(self, model: Any, options: LoadOptions) -> list[str]:
        """Refuses `float8_kv_cache`, which transformers' `generate` does not have."""
        if options.float8_kv_cache is not True:
            return []
        return ["float8_kv_cache=True: transformers' generate has no FP8 cache. Leave it out"]

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
        in_fp8 = state.load_options is not None and state.load_options.float8_kv_cache is True
        state.engine = decode_engine_for(causal_lm_of(model).device.type, in_fp8)
    return STOCK if state.engine is None else state.engine


def decode_engine_for(device: str, in_fp8: bool) -> DecodeEngine | None:
    """Returns a new engine for a model on a kind of device, None where transformers' own loop should run. in_fp8: whether
    `float8_kv_cache` was asked for."""
    if not in_fp8 and device not in DECODED:
        return None
    return DecodeEngine({*DECODED, device}, cache=torch.float8_e4m3fn if in_fp8 else None)
