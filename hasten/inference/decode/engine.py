"""`DecodeEngine`: what `generate` calls on a GPU. transformers prepares the call; the loop over tokens is hasten's.

transformers' `generate` takes a decoding loop (`custom_generate`). So arguments, generation configs, logits processors, stopping
criteria and streamers are transformers' own, with their own semantics.
"""

import copy
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation import StoppingCriteriaList, StopStringCriteria

from hasten.inference.decode.loop import Asked, decode
from hasten.inference.decode.servable import unserved
from hasten.inference.decode.steps import Steps
from hasten.inference.generate import asked, generate
from hasten.options import LoadOptions
from hasten.state import GenerateCall, state_of


class DecodeEngine:
    """Serves greedy decoding and sampling of one model; hands every other call to transformers' own `generate`.

    One call runs at a time: other threads wait, and a call from within a call (a criterion that generates) is transformers' own.
    """

    name = "hasten"

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        """devices: kinds of devices that are served; on a CPU steps run eagerly, slower than transformers' own loop."""
        self._devices = tuple(devices)
        self._steps = Steps()
        self._lock = threading.RLock()
        self._is_running = False
        self._done: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeEngine":
        return DecodeEngine(self._devices)  # graphs belong to the model whose weights they read

    def __reduce__(self) -> tuple[type["DecodeEngine"], tuple[tuple[str, ...]]]:
        return DecodeEngine, (self._devices,)

    @property
    def captured(self) -> int:
        """Steps that are kept, one per batch bucket and state of the weights."""
        return len(self._steps)

    def check(self, options: LoadOptions) -> list[str]:
        return []

    def generate(self, model: Any, call: GenerateCall) -> Any:
        """Returns what transformers' `generate` returns. Raises InputError, see `inference.generate`."""
        with self._lock:
            reason = "a call of this model is running" if self._is_running else unserved(model, call, self._devices)
            state_of(model).notes["generation"] = [
                f"engine: {'transformers, since ' + reason if reason else self.name}"
            ]
            if reason is None:
                self._is_running = True
                try:
                    return self._serve(model, call)
                finally:
                    self._is_running = False
        return generate(model, call.stock, *call.args, **call.kwargs)

    def _serve(self, model: Any, call: GenerateCall) -> Any:
        args, kwargs = _with_stop_strings(model, call)

        def loop(model: Any, input_ids: torch.Tensor, prepared: dict[str, Any]) -> Any:
            given = call.kwargs.get("past_key_values") is not None
            with self._in_order(model.device):
                return decode(
                    model, self._steps, Asked(input_ids, prepared, call.kwargs.get("streamer"), own_cache=given)
                )

        return generate(model, call.stock, *args, **kwargs, custom_generate=_as_function(loop))

    @contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        """Lets the GPU finish the call before this one, which may have run on another stream, before the block's work starts."""
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record()


def _with_stop_strings(model: Any, call: GenerateCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the call's arguments with `stop_strings` as a criterion: transformers does not pass the tokenizer on to a decoding
    loop that it is given."""
    args, kwargs = call.args, dict(call.kwargs)
    strings, tokenizer = asked(model, call, "stop_strings"), kwargs.get("tokenizer")
    if strings is None or tokenizer is None:
        return args, kwargs
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
    kwargs.pop("stop_strings", None)
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if config is not None:
        config = copy.deepcopy(config)
        config.stop_strings = None
        args, kwargs["generation_config"] = args[:1], config
    if model.generation_config.stop_strings is not None:
        kwargs["stop_strings"] = None
    return args, kwargs


def _as_function(loop: Callable[..., Any]) -> Callable[..., Any]:
    """transformers compares the signature with that of its own loops, so it must name what those name."""

    def decode(
        model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        prepared = {
            **kwargs,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
        }
        return loop(model, input_ids, prepared)

    return decode
