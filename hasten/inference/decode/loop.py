"""The loop over new tokens. transformers has prepared the call: prompt, generation config, logits processors, criteria.

B sequences, W positions of the prompt, V entries of the vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from hasten.inference.decode.cache import KVCache
from hasten.inference.decode.prefix import append, load
from hasten.inference.decode.prompt import Fed, fed, run_prompt
from hasten.inference.decode.step import DecodeStep
from hasten.inference.decode.steps import Steps
from hasten.inference.decode.stops import StopWatch, lag_for
from hasten.overlays.cache_name import CACHE
from hasten.overlays.precision import compute_dtype


@dataclass(frozen=True)
class Asked:
    """A call. prepared: what transformers gives its own loops by name (`logits_processor`, `generation_config`, ...). streamer:
    None = none. dtype: of the cache, None = that of the keys. own_cache: whether the caller gave a cache. lag: see `DecodeEngine`."""

    input_ids: torch.Tensor
    prepared: dict[str, Any]
    streamer: Any = None
    dtype: torch.dtype | None = None
    own_cache: bool = False
    lag: int | None = None

    @property
    def config(self) -> Any:
        """The generation config."""
        return self.prepared["generation_config"]

    @property
    def processors(self) -> Any:
        """A LogitsProcessorList."""
        return self.prepared["logits_processor"]

    @property
    def criteria(self) -> Any:
        """A StoppingCriteriaList."""
        return self.prepared["stopping_criteria"]

    @property
    def keeps_cache(self) -> bool:
        """Whether the caller gets keys and values."""
        return self.own_cache or self.config.return_dict_in_generate


@dataclass
class _Sequences:
    """ids_BW: the sequences, allocated in steps. scores, logits: (B, V) of each step, None = not asked for."""

    ids_BW: torch.Tensor
    scores: list[torch.Tensor] | None
    logits: list[torch.Tensor] | None
    growth: int = field(default=256)

    def add(self, token_B: torch.Tensor, length: int) -> torch.Tensor:
        """Writes the last token of sequences of `length`. Returns these."""
        if length > self.ids_BW.shape[1]:
            spare = self.ids_BW.new_empty(len(self.ids_BW), self.growth)
            self.ids_BW, self.growth = torch.cat((self.ids_BW, spare), dim=1), self.growth * 2
        self.ids_BW[:, length - 1] = token_B
        return self.ids_BW[:, :length]


def decode(model: Any, steps: Steps, asked: Asked) -> Any:
    """Returns what transformers' `generate` returns: ids (B, W + new) or a `GenerateDecoderOnlyOutput`."""
    batch, width = asked.input_ids.shape
    limit = max(int(asked.criteria.max_length or 0), width + 1)
    prompt = fed(asked.input_ids, asked.prepared, asked.keeps_cache)
    cache, step = steps.take(model, batch, prompt.slots + limit - width, asked.dtype)
    try:
        sequences, end = _run(model, cache, step, asked, prompt, limit)
        past = None
        if asked.keeps_cache:
            past = asked.prepared[CACHE]
            dtype = compute_dtype(model.get_input_embeddings().weight)
            append(past, cache, batch, prompt.slots + end - width - 1, dtype)
    finally:
        cache.release()
    if asked.streamer is not None:
        asked.streamer.end()
    ids = sequences.ids_BW[:, :end].clone()
    if not asked.config.return_dict_in_generate:
        return ids
    records = (sequences.scores, sequences.logits)
    scores, logits = (None if one is None else tuple(one[: end - width]) for one in records)
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=logits, **{CACHE: past})  # pyright: ignore


def _run(model: Any, cache: KVCache, step: DecodeStep, asked: Asked, prompt: Fed, limit: int) -> tuple[_Sequences, int]:
    """Returns the sequences and the length at which the last one stopped."""
    config, ids = asked.config, asked.input_ids
    batch, width, device = *ids.shape, ids.device
    pad: Any = None if config._pad_token_tensor is None else config._pad_token_tensor.to(device)
    is_dictionary = config.return_dict_in_generate
    scored, recorded = (is_dictionary and wanted for wanted in (config.output_scores, config.output_logits))
    sequences = _Sequences(ids.long(), [] if scored else None, [] if recorded else None)
    copies = bool(len(asked.processors) or scored or recorded)
    checks: Any = StoppingCriteriaList(one for one in asked.criteria if type(one) is not MaxLengthCriteria)
    has_eos = any(hasattr(one, "eos_token_id") for one in checks)
    lag = lag_for(device, (*asked.processors, *checks)) if asked.lag is None else asked.lag
    watch = StopWatch(device, asked.streamer, lag, draws=config.do_sample)
    running = torch.ones(batch, dtype=torch.bool, device=device)
    cache.reserve(prompt.slots)
    if prompt.cached:
        load(asked.prepared[CACHE], cache)
    logits, slots = run_prompt(model, cache, step, prompt), prompt.slots
    for length in range(width + 1, limit + 1):
        scores = logits = logits.to(device, copy=copies)
        if len(asked.processors):
            scores = asked.processors(sequences.ids_BW[:, : length - 1].contiguous(), logits)
        for record, one in ((sequences.scores, scores), (sequences.logits, logits)):
            if record is not None:
                record.append(one)
        if config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        elif len(asked.processors) or length == width + 1:
            token = scores.argmax(-1)
        else:  # the step has chosen it
            token = step.token_B1[:batch, 0].to(device, copy=True)
        if has_eos:
            token = torch.where(running, token, pad)
        found = sequences.add(token, length)
        if len(checks):
            running &= ~checks(
                found if lag else found.contiguous(), None if sequences.scores is None else tuple(sequences.scores)
            )
        if (len(checks) or asked.streamer is not None) and watch.add(running, token, length):
            break
        if length < limit:
            slots += 1
            cache.reserve(slots)
            step.token_B1[:batch, 0] = token
            step.run()
            logits = step.logits_BV[:batch]
    return sequences, watch.finish() or limit
