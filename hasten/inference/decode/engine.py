"""`DecodeEngine`: what `generate` calls on a GPU. transformers prepares the call; the loop over tokens is hasten's.

transformers' `generate` takes a decoding loop (`custom_generate`). So arguments, generation configs, logits processors, stopping
criteria and streamers are transformers' own, with their own semantics.
"""

import copy
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers.generation import StoppingCriteriaList, StopStringCriteria

from hasten.errors import OptionError
from hasten.inference.decode.loop import Asked, decode
from hasten.inference.decode.servable import cache_dtype, unserved, unserved_model
from hasten.inference.decode.steps import Steps
from hasten.inference.generate import asked, generate
from hasten.options import LoadOptions
from hasten.overlays.cache_name import CACHE
from hasten.state import GenerateCall, state_of

SEVERAL_DEVICES = False
"""Whether models on several GPUs are served (`split`). Their steps are tested on a CPU with operations recorded in place of CUDA
graphs, and have not run on GPUs."""


class DecodeEngine:
    """Serves greedy decoding and sampling of one model; hands every other call to transformers' own `generate`.

    One call runs at a time: other threads wait, and a call from within a call (a criterion that generates) is transformers' own.
    """

    name = "hasten"

    def __init__(
        self, devices: Collection[str] = ("cuda",), cache: torch.dtype | None = None, lag: int | None = None
    ) -> None:
        """devices: kinds of devices that are served; on a CPU steps run eagerly, slower than transformers' own loop. cache: dtype
        of the KV cache where a call asks for none, int8 or float8_e4m3fn; None = that of the keys. lag: steps that the host may
        be ahead of the device; None = by device and call (`stops.lag_for`)."""
        self._devices, self._cache, self._lag = tuple(devices), cache, lag
        self._steps = Steps()
        self._lock = threading.RLock()
        self._is_running = False
        self._done: dict[torch.device, torch.cuda.Event] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeEngine":
        return DecodeEngine(self._devices, self._cache, self._lag)  # graphs belong to the model whose weights they read

    def __reduce__(self) -> tuple[type["DecodeEngine"], tuple[Any, ...]]:
        return DecodeEngine, (self._devices, self._cache, self._lag)

    @property
    def captured(self) -> int:
        """Steps that are kept, one per batch bucket and state of the weights."""
        return len(self._steps)

    def check(self, model: Any, options: LoadOptions) -> list[str]:
        """Refuses `float8_kv_cache` for a model that transformers' own loop must serve, whose cache is not FP8."""
        reason = unserved_model(model, self._devices, SEVERAL_DEVICES) if options.float8_kv_cache is True else None
        if reason is None:
            return []
        return [
            f"float8_kv_cache=True: hasten's decode engine cannot serve this model, since {reason}, and transformers' generate has no "
            "FP8 cache. Leave it out"
        ]

    def generate(self, model: Any, call: GenerateCall) -> Any:
        """Returns what transformers' `generate` returns. Raises InputError, see `inference.generate`, and OptionError for a quantised
        cache of hasten's in a call that transformers' own loop must serve."""
        with self._lock:
            dtype = cache_dtype(model, call)
            reason = "a call of this model is running" if self._is_running else None
            reason = reason or unserved(model, call, self._devices, SEVERAL_DEVICES)
            if dtype is not None and reason is not None:
                raise OptionError(
                    "generate", [f"the quantised cache was asked for, but {reason}. Leave cache_config out"]
                )
            self._note(model, reason)
            if reason is None:
                self._is_running = True
                try:
                    return self._serve(model, call, dtype)
                finally:
                    self._is_running = False
        return generate(model, call.stock, *call.args, **call.kwargs)

    def _note(self, model: Any, reason: str | None) -> None:
        note = f"engine: {'transformers, since ' + reason if reason else self.name}"
        if reason is not None and self._cache is not None:
            note += "; its keys and values are not quantised"
        state_of(model).notes["generation"] = [note]

    def _serve(self, model: Any, call: GenerateCall, dtype: torch.dtype | None) -> Any:
        streamer, given = call.kwargs.get("streamer"), call.kwargs.get(CACHE) is not None
        if dtype is not None:
            call = _without(model, call, ("cache_implementation", "cache_config"))
        call = _with_stop_strings(model, call)

        def loop(model: Any, input_ids: torch.Tensor, prepared: dict[str, Any]) -> Any:
            with self._in_order(model):
                made = Asked(input_ids, prepared, streamer, dtype or self._cache, given, self._lag)
                return decode(model, self._steps, made)

        return generate(model, call.stock, *call.args, **call.kwargs, custom_generate=_as_function(loop))

    @contextmanager
    def _in_order(self, model: Any) -> Iterator[None]:
        """Lets the GPUs finish the call before this one, which may have run on other streams, before the block's work starts."""
        places = set(getattr(model, "hf_device_map", {}).values())
        devices = {parameter.device for parameter in model.parameters()} if len(places) > 1 else {model.device}
        gpus = [device for device in devices if device.type == "cuda"]
        for device in gpus:
            if device in self._done:
                torch.cuda.current_stream(device).wait_event(self._done[device])
        try:
            with torch.cuda.device(model.device) if gpus else nullcontext():
                yield
        finally:
            for device in gpus:
                self._done[device] = torch.cuda.Event()
                self._done[device].record(torch.cuda.current_stream(device))


def _with_stop_strings(model: Any, call: GenerateCall) -> GenerateCall:
    """Returns the call with `stop_strings` as a criterion: transformers does not pass the tokenizer on to a decoding loop that it
    is given."""
    strings, tokenizer = asked(model, call, "stop_strings"), call.kwargs.get("tokenizer")
    if strings is None or tokenizer is None:
        return call
    criterion = StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)
    criteria = StoppingCriteriaList([*(call.kwargs.get("stopping_criteria") or ()), criterion])
    call = replace(call, kwargs={**call.kwargs, "stopping_criteria": criteria})
    return _without(model, call, ("stop_strings",))


def _without(model: Any, call: GenerateCall, names: Collection[str]) -> GenerateCall:
    """Returns the call without these generation parameters, whether they come by name or from a generation config."""
    args, kwargs = call.args, {name: value for name, value in call.kwargs.items() if name not in names}
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if config is not None:
        args, kwargs["generation_config"] = args[:1], copy.deepcopy(config)
    for name in names:
        if config is not None:
            setattr(kwargs["generation_config"], name, None)
        if getattr(model.generation_config, name) is not None:  # it would fill the gap
            kwargs[name] = None
    return replace(call, args=args, kwargs=kwargs)


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
