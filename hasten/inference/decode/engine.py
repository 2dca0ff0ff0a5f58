"""`DecodeEngine`: what `generate` calls on a GPU. transformers prepares the call; the loop over tokens is hasten's.

transformers' `generate` takes a decoding loop (`custom_generate`). So arguments, generation configs, logits processors, stopping
criteria and streamers are transformers' own, with their own semantics.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from hasten.inference.decode.cache import KVCache, shape_for
from hasten.inference.decode.context import CachedAttention
from hasten.inference.decode.servable import fingerprint, unserved
from hasten.inference.decode.step import DecodeStep
from hasten.inference.generate import generate
from hasten.ops.attention import row_spans
from hasten.options import LoadOptions
from hasten.state import GenerateCall, state_of

STOP_LAG = 8
"""Steps between two looks at whether every sequence has stopped: each look makes the host wait for the GPU."""


class DecodeEngine:
    """Serves greedy decoding and sampling of one model; hands every other call to transformers' own `generate`."""

    name = "hasten"

    def __init__(self, devices: Collection[str] = ("cuda",)) -> None:
        """devices: kinds of devices that are served; on a CPU steps run eagerly, slower than transformers' own loop."""
        self._devices = tuple(devices)
        self._steps: dict[Any, tuple[Any, KVCache, DecodeStep]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeEngine":
        return DecodeEngine(self._devices)  # graphs belong to the model whose weights they read

    def __reduce__(self) -> tuple[type["DecodeEngine"], tuple[tuple[str, ...]]]:
        return DecodeEngine, (self._devices,)

    def check(self, options: LoadOptions) -> list[str]:
        return []

    def generate(self, model: Any, call: GenerateCall) -> Any:
        """Returns what transformers' `generate` returns. Raises InputError, see `inference.generate`."""
        reason = unserved(model, call, self._devices)
        state_of(model).notes["generation"] = [f"engine: {'transformers, since ' + reason if reason else self.name}"]
        if reason is not None:
            return generate(model, call.stock, *call.args, **call.kwargs)
        loop = partial(self._decode, call.kwargs.get("streamer"))
        return generate(model, call.stock, *call.args, **call.kwargs, custom_generate=_as_function(loop))

    def _decode(self, streamer: Any, model: Any, input_ids: torch.Tensor, prepared: dict[str, Any]) -> Any:
        config, processors = prepared["generation_config"], prepared["logits_processor"]
        criteria, limit = prepared["stopping_criteria"], int(prepared["stopping_criteria"].max_length)
        batch, width = input_ids.shape
        cache, step = self._step_for(model, batch)
        ids = input_ids.new_empty(batch, limit)
        ids[:, :width] = input_ids
        has_eos = any(hasattr(one, "eos_token_id") for one in criteria)
        running = torch.ones(batch, dtype=torch.bool, device=ids.device)
        stopped = torch.zeros(
            limit + 1, dtype=torch.bool, device=ids.device
        )  # at each length, whether every sequence had
        try:
            cache.reserve(limit)
            logits = _read_prompt(model, cache, step, input_ids, prepared)
            for length in range(width + 1, limit + 1):
                scores = processors(ids[:, : length - 1], logits.clone() if len(processors) else logits)
                token = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
                if has_eos:
                    token = torch.where(running, token, config._pad_token_tensor.to(token.device))
                ids[:, length - 1] = token
                if streamer is not None:
                    streamer.put(token.cpu())
                running &= ~criteria(ids[:, :length], None)
                stopped[length] = ~running.any()
                look = streamer is not None or (length - width) % STOP_LAG == 0
                if length == limit or (look and bool(stopped[length])):
                    break
                step.token_B1.copy_(token[:, None])
                step.run()
                logits = step.logits_BV
        finally:
            cache.release()
        if streamer is not None:
            streamer.end()
        # A look that came late ran some steps too many.
        return ids[:, : int(stopped[: length + 1].long().argmax()) or length]

    def _step_for(self, model: Any, batch: int) -> tuple[KVCache, DecodeStep]:
        """The cache and the step of this batch size; made anew where anything that a graph has baked in has changed."""
        baked = fingerprint(model)
        found = self._steps.get(batch)
        if found is not None and found[0] == baked:
            found[1].slots_B.zero_()
            return found[1:]
        cache = KVCache(shape_for(model, batch))
        step = DecodeStep(model, cache)
        self._steps[batch] = (baked, cache, step)
        return cache, step


def _read_prompt(
    model: Any, cache: KVCache, step: DecodeStep, input_ids: torch.Tensor, prepared: dict[str, Any]
) -> torch.Tensor:
    """Runs the prompt and leaves its keys and values in the cache. Returns the next token's logits (B, V), fp32."""
    batch, width = input_ids.shape
    mask, positions = prepared.get("attention_mask"), prepared.get("position_ids")
    spans = None
    cache.starts_B.zero_()
    if mask is not None:
        spans = row_spans((batch, width, input_ids.device), mask, None, None)
        cache.starts_B.copy_(width - mask.sum(1))
    if positions is None:
        positions = torch.arange(width, device=input_ids.device).expand(batch, -1) - cache.starts_B[:, None]
        positions = positions.clamp_min(0)
    context = CachedAttention(cache, prompt=True, spans_BT3=spans)
    outputs = model(
        input_ids=input_ids, position_ids=positions, attention_context=context, use_cache=False, logits_to_keep=1
    )
    cache.slots_B.fill_(width)
    step.position_B1.copy_(positions[:, -1:] + 1)
    return outputs.logits[:, -1].float()


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
