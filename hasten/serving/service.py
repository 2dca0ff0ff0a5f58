"""A loaded model as a service: which ids a call's prompts are, and the requests that it becomes."""

import copy
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.errors import TokenizerError
from hasten.inference.decode.request import Limits, Piece, Request
from hasten.inference.decode.sampling import Sampling
from hasten.inference.text import TextStream, decoder
from hasten.serving.conversation import encode_chat
from hasten.serving.protocol import ApiError, CallBody, ChatBody, CompletionBody
from hasten.serving.worker import Worker, choose_runner
from hasten.state import causal_lm_of


@dataclass
class Service:
    """name: of the model in the protocol. defaults: of sampling parameters that a call leaves out. eos: ids that end an
    answer.

    note: how requests are decoded. created: seconds since 1970.
    """

    name: str
    tokenizer: Any
    worker: Worker
    defaults: Sampling
    eos: frozenset[int]
    note: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._encoding = threading.Lock()  # tokenizers keep settings of the call that runs
        self._decode = decoder(copy.deepcopy(self.tokenizer))

    def warm_up(self) -> None:
        """Queues a request of two tokens, whose steps compile kernels and capture the CUDA graph before the first
        client's."""
        limits = Limits(2 if self.capacity > 2 else 1)
        self.worker.submit([Request([min(self.eos, default=0)], limits, Sampling(), TextStream(self._decode))])

    @property
    def capacity(self) -> int:
        """Tokens of a sequence at most, prompt and answer together."""
        return self.worker.runner.capacity

    def encode(self, body: ChatBody | CompletionBody) -> list[list[int]]:
        """Returns the ids of each prompt. Raises ApiError for a conversation that the template does not take, an empty
        prompt and unknown ids."""
        if body.sequences() > self.worker.waiting:
            raise ApiError(400, f"{body.sequences()} sequences were asked for; one call may have {self.worker.waiting}")
        with self._encoding:
            if isinstance(body, ChatBody):
                try:
                    return [encode_chat(self.tokenizer, [message.plain() for message in body.messages])]
                except TokenizerError as error:
                    raise ApiError(400, str(error), param="messages") from error
            found = [self.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in body.prompts()]
        for ids in found:
            if not ids:
                raise ApiError(400, "a prompt without a token was given, and this tokenizer adds none", param="prompt")
            if unknown := [index for index in ids if not 0 <= index < len(self.tokenizer)]:
                raise ApiError(
                    400, f"the tokenizer has ids 0 to {len(self.tokenizer) - 1}, not {unknown[0]}", param="prompt"
                )
        return found

    def requests(
        self, body: CallBody, prompts: Sequence[list[int]], deliver: Callable[[int], Callable[[Piece], None]]
    ) -> list[Request]:
        """Returns the requests of a call, `n` for each prompt. deliver: number of a request -> what its pieces are
        handed to.

        Raises ApiError where a prompt, or a prompt and the new tokens asked for, is longer than the model was loaded
        for."""
        sampling = self._sampling(body)
        stops = body.stops()
        eos = self.eos | self._special(stops)
        made = []
        for prompt in prompts:
            limits = Limits(self._most(len(prompt), body.answer_limit()), eos)
            for number in range(body.n or 1):
                own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
                text = TextStream(self._decode, stops)
                made.append(Request(prompt, limits, own, text, deliver(len(made))))
        return made

    def _most(self, prompt: int, asked: int | None) -> int:
        """Returns the most new tokens after a prompt of `prompt` tokens."""
        wanted = max(asked or 1, 1)
        if prompt + wanted > self.capacity:
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens and at least {wanted} new ones are asked for; this model was loaded "
                f"for sequences of {self.capacity}. Shorten the prompt, lower max_tokens, or start the server with a "
                "larger --max-seq-length; nothing is truncated silently.",
                "context_length_exceeded",
            )
        return self.capacity - prompt if asked is None else asked

    def _sampling(self, body: CallBody) -> Sampling:
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        return replace(self.defaults, **{n: getattr(body, n) for n in names if getattr(body, n) is not None})

    def _special(self, stops: Sequence[str]) -> frozenset[int]:
        """Returns the ids of stop strings that are special tokens: they are no part of the text, in which stop strings
        are looked for."""
        special = {str(token): index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(special[stop] for stop in stops if stop in special)


def open_service(
    model: Any, tokenizer: Any, name: str, rows: int = 8, waiting: int = 64, devices: Sequence[str] = ("cuda",)
) -> Service:
    """Returns the service of a loaded model, whose worker has not been started.

    model: a causal LM or a PeftModel of hasten, in evaluation mode. rows: sequences that are decoded together. waiting:
    the most requests in the queue. devices: kinds of devices for continuous batching."""
    config = causal_lm_of(model).generation_config
    runner, note = choose_runner(model, rows, devices)
    ends = [tokenizer.eos_token_id, config.eos_token_id]
    eos = {index for one in ends if one is not None for index in (one if isinstance(one, list) else [one])}
    draws = {n: getattr(config, n, None) for n in ("temperature", "top_k", "top_p")} if config.do_sample else {}
    given = {"temperature": 1.0, **{name: value for name, value in draws.items() if value is not None}}
    defaults = Sampling(**given, repetition_penalty=getattr(config, "repetition_penalty", None) or 1.0)
    return Service(name, tokenizer, Worker(runner, model.device, waiting), defaults, frozenset(eos), note)
