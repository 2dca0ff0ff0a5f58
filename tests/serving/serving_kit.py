"""A server over a tiny model on loopback, in a thread, and what transformers answers to the same prompts."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from openai import OpenAI

from hasten.inference.text import decoder
from hasten.methods import CausalLMMethods
from hasten.patching import apply
from hasten.serving.app import create_app
from hasten.serving.server import bind
from hasten.serving.service import Service, open_service
from hasten.testing.tiny import tiny_model, tiny_tokenizer

NAME = "tiny"
BATCHED = ("cpu", "cuda")


def stock_model() -> Any:
    """256 positions. The head is not tied: a tied one mostly repeats the last token."""
    return tiny_model("llama", tie_word_embeddings=False, max_position_embeddings=256)


def tiny_service(devices: Sequence[str] = BATCHED, template: bool = True, **settings: Any) -> Service:
    """Of a model with overlays. Continuous batching on a CPU too, unless `devices` says otherwise."""
    model = stock_model()
    apply(model, methods=CausalLMMethods)
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    return open_service(model, tokenizer, NAME, devices=devices, **settings)


@contextmanager
def serving(service: Service, key: str | None = None, hosts: Sequence[str] | None = None) -> Iterator[str]:
    """Yields the server's URL."""
    taken = bind("127.0.0.1", 0, has_key=False)
    config = uvicorn.Config(create_app(service, key, hosts), log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([taken],))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        taken.close()


@contextmanager
def client_of(url: str, key: str = "none") -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client:
        yield client


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def stock_tokens(prompt: list[int], most: int, **asked: Any) -> list[int]:
    ids = torch.tensor([prompt])
    asked = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0, **asked}
    return stock_model().generate(ids, max_new_tokens=most, **asked)[0, ids.shape[1] :].tolist()


def text_of(tokens: list[int]) -> str:
    return decoder(tiny_tokenizer())(tokens)


def chat_ids(*messages: dict[str, str]) -> list[int]:
    encoded: Any = tiny_tokenizer().apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]
