"""Continuous batching: requests enter and leave the rows of one KV cache between the steps of the others.

A step decodes every row, used or not, so that one CUDA graph serves all. The host reads a step's tokens after it has
started the next one, so the device does not wait for it; a sequence that turns out to have ended has decoded one token
too many, which is dropped."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from hasten.errors import InputError
from hasten.inference.decode.cache import KVCache, shape_for
from hasten.inference.decode.context import CachedAttention
from hasten.inference.decode.request import Request
from hasten.inference.decode.sampling import Sampler
from hasten.inference.decode.servable import unserved
from hasten.inference.decode.step import DecodeStep
from hasten.state import GenerateCall

PROCESSORS = (
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "watermarking_config",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
)
"""Parameters of a generation config that change the logits and that `Sampling` does not have."""


def unbatched(model: Any, devices: Collection[str] = ("cuda",)) -> str | None:
    """Returns why `DecodeBatch` cannot decode a causal LM as its `generate` would, None if it can."""
    for name in PROCESSORS:
        value = getattr(model.generation_config, name, None)
        if value not in (None, 0, 1.0, [], {}):
            return f"the generation config has {name}={value!r}"
    return unserved(model, GenerateCall(model.generate), devices)


@dataclass
class _Row:
    """slots: tokens in the cache once the started steps have run. left: steps still to start."""

    request: Request
    generator: torch.Generator
    slots: int
    left: int


@dataclass(frozen=True)
class _Reading:
    """Tokens on their way to the host. tokens: (B, 1) or (1, 1). takers: (row of `tokens`, index in the batch,
    request)."""

    tokens: torch.Tensor
    arrived: torch.cuda.Event | None
    takers: list[tuple[int, int, Request]]


class DecodeBatch:
    """Decodes up to `rows` requests of one model together. Greedy tokens in fp32 are those of each request alone; in 16
    bits matmuls of several sequences may round differently. Not thread-safe; the model must not change meanwhile."""

    def __init__(self, model: Any, rows: int) -> None:
        """model: a causal LM for which `unbatched` returns None. Allocates the step's inputs; the cache's blocks only
        when they are needed."""
        self._model, self._device = model, shape_for(model, rows).device
        self._cache = KVCache(shape_for(model, rows))
        self._step = DecodeStep(model, self._cache)
        self._rows: list[_Row | None] = [None] * rows
        self._readings: deque[_Reading] = deque()
        self._seen_BV: torch.Tensor | None = None
        self._regroup()

    @property
    def capacity(self) -> int:
        """Tokens of a sequence at most, prompt and answer together."""
        return self._cache.shape.capacity

    @property
    def free(self) -> int:
        """Rows that a request can enter."""
        return self._rows.count(None)

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return self.free < len(self._rows)

    @torch.no_grad()
    def admit(self, request: Request) -> None:
        """Reads the request's prompt into a free row and starts its first token.

        Raises InputError for a prompt without a token, and for more tokens than `capacity`. If it raises, no row is
        taken."""
        length, most = len(request.prompt), request.limits.max_tokens
        if not length or length + most > self.capacity:
            raise InputError(
                f"a prompt of {length} tokens and {most} new ones were asked for; a sequence holds {self.capacity} tokens, "
                "and a prompt at least one. Shorten the prompt, ask for fewer tokens, or load the model with a longer max_seq_length."
            )
        index = self._rows.index(None)
        self._cache.reserve(length + 1)
        row = _Row(request, request.sampling.generator(self._device), length, most - 1)
        token = self._read_prompt(index, row)
        self._rows[index] = row
        self._regroup()
        self._read(token, [(0, index, request)])

    @torch.no_grad()
    def advance(self) -> None:
        """Starts a step for all requests that need one, and hands the tokens of the step before to their requests."""
        for index, row in enumerate(self._rows):
            if row is not None and row.request.cancelled and row.request.finish is None:
                row.request.drop()
                self._leave(index, row.request)
        unread = len(self._readings)
        takers = [(i, i, row.request) for i, row in enumerate(self._rows) if row is not None and row.left > 0]
        if takers:
            self._start_step(takers)
        for _ in range(unread):
            self._hand_out(self._readings.popleft())
        if not self.busy:
            self.clear()

    def clear(self) -> None:
        """Forgets all requests and frees the cache."""
        self._rows = [None] * len(self._rows)
        self._readings.clear()
        self._cache.release()
        self._regroup()

    def _read_prompt(self, index: int, row: _Row) -> torch.Tensor:
        """Runs the prompt over the row's part of the cache. Returns the first new token (1, 1), which the next step
        reads too."""
        prompt, part = row.request.prompt, self._cache.row(index)
        for counter in (part.slots_B, part.starts_B):
            counter.zero_()
        ids = torch.tensor([prompt], device=self._device)
        outputs = self._model(
            input_ids=ids,
            position_ids=torch.arange(len(prompt), device=self._device)[None],
            attention_context=CachedAttention(part, prompt=True),
            use_cache=False,
            logits_to_keep=1,
        )
        logits = outputs.logits[:, -1].float()
        part.slots_B.fill_(len(prompt))
        self._step.position_B1[index].fill_(len(prompt))
        token = logits.argmax(-1, keepdim=True)
        sampler = Sampler(1, {0: (row.request.sampling, row.generator)}, self._device)
        seen = None
        if sampler.penalises:
            every = self._seen_BV
            if every is None:
                every = self._seen_BV = logits.new_zeros(len(self._rows), logits.shape[-1], dtype=torch.bool)
            seen = every[index : index + 1]
            seen.zero_().index_fill_(1, ids[0], True)
        sampler.choose(logits, token, seen)
        if seen is not None:
            seen.scatter_(1, token, True)
        self._step.token_B1[index].copy_(token[0])
        return token

    def _start_step(self, takers: list[tuple[int, int, Request]]) -> None:
        self._cache.reserve(max(row.slots for row in self._rows if row is not None) + 1)
        if self.free:  # each step counts up in every row
            for counter in (self._cache.slots_B, self._step.position_B1[:, 0]):
                counter.mul_(self._used_B)
        self._step.run()
        token = self._step.token_B1
        self._sampler.choose(self._step.logits_BV, token, self._seen_BV)
        if self._sampler.penalises and self._seen_BV is not None:
            self._seen_BV.scatter_(1, token, True)
        for row in self._rows:
            if row is not None:
                row.slots += 1
                row.left -= 1
        self._read(token, takers)

    def _read(self, token: torch.Tensor, takers: list[tuple[int, int, Request]]) -> None:
        """Starts the copy of tokens to the host."""
        if self._device.type != "cuda":
            self._readings.append(_Reading(token.clone(), None, takers))
            return
        arrived = torch.cuda.Event()
        copy = token.to("cpu", non_blocking=True)  # into pinned memory
        arrived.record(torch.cuda.current_stream(self._device))
        self._readings.append(_Reading(copy, arrived, takers))

    def _hand_out(self, reading: _Reading) -> None:
        if reading.arrived is not None:
            reading.arrived.synchronize()
        tokens = reading.tokens[:, 0].tolist()
        for place, index, request in reading.takers:
            if request.finish is None:
                request.take(tokens[place])
                if request.finish is not None:
                    self._leave(index, request)

    def _leave(self, index: int, request: Request) -> None:
        row = self._rows[index]
        assert row is not None and row.request is request
        self._rows[index] = None
        self._regroup()

    def _regroup(self) -> None:
        """Copies to the device which rows are used, and how they sample."""
        used = [row is not None for row in self._rows]
        self._used_B = torch.tensor(used, dtype=torch.int32, device=self._device)
        rows = {i: (row.request.sampling, row.generator) for i, row in enumerate(self._rows) if row is not None}
        self._sampler = Sampler(len(self._rows), rows, self._device)
