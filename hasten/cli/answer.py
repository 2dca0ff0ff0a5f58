"""One answer at the terminal: generated, printed as it comes, timed."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer
from transformers import TextStreamer

from hasten.errors import InputError
from hasten.serving.conversation import encode_chat
from hasten.state import causal_lm_of


@dataclass(frozen=True)
class Settings:
    """sampling: arguments of `generate`. raw: prompts are continued as they are, without the chat template."""

    max_seq_length: int
    max_new_tokens: int
    sampling: Mapping[str, Any]
    raw: bool = False


@dataclass(frozen=True)
class Answer:
    """text: as printed. tokens: new ones. ended: False where a limit or the user ended it."""

    text: str
    prompt_tokens: int
    tokens: int
    first: float
    rest: float
    ended: bool

    def speed(self) -> str:
        """Describes tokens and time, in seconds until the first token and tokens per second after it."""
        rate = f", {(self.tokens - 1) / self.rest:.1f} tokens/s" if self.tokens > 1 and self.rest > 0 else ""
        return f"{self.prompt_tokens} + {self.tokens} tokens, the first after {self.first:.2f} s{rate}"


class Printer(TextStreamer):
    """Prints the text of new tokens when a word is complete. text: printed so far. times: when each token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.last = "", -1
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt, then token after token."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.last = int(value.flatten()[-1])
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints."""
        self.text += text
        typer.echo(text, nl=stream_end)


def encode(tokenizer: Any, messages: Sequence[Mapping[str, str]], raw: bool) -> list[int]:
    """Returns the ids of a conversation; of its last message alone as plain text where `raw`."""
    return tokenizer(messages[-1]["content"])["input_ids"] if raw else encode_chat(tokenizer, messages)


def answer(model: Any, tokenizer: Any, prompt: Sequence[int], most: int, sampling: Mapping[str, Any]) -> Answer:
    """Generates and prints at most `most` new tokens. An interrupt ends the answer, not the program.

    Raises InputError where the GPU's memory does not suffice, and what `generate` raises.
    """
    printer, start = Printer(tokenizer), time.perf_counter()
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=model.device)
    interrupted = False
    try:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, streamer=printer, **sampling
        )
    except KeyboardInterrupt:
        interrupted = True
        printer.end()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and {most} new ones do not fit into the GPU's memory ({error}). Ask for "
            "less (--max-new-tokens), or load the model with fewer bits (--load)."
        ) from error
    times = printer.times or [time.perf_counter()]
    stops = causal_lm_of(model).generation_config.eos_token_id
    ended = not interrupted and printer.last in (stops if isinstance(stops, list) else [stops])
    return Answer(printer.text, len(prompt), len(printer.times), times[0] - start, times[-1] - times[0], ended)
