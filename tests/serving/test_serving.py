"""`hasten serve` over loopback, called by the official client: answers are those of transformers' generate, alone and together."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI
from serving_kit import (
    NAME,
    chat_ids,
    client_of,
    serving,
    stock_tokens,
    text_of,
    tiny_service,
    wait_for,
)

from hasten.serving.service import Service
from hasten.testing.tiny import tiny_tokenizer

ASK = {"role": "user", "content": "why?"}
LONG = "once"
"""A prompt whose answer has no EOS for long."""
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def service() -> Service:
    return tiny_service(rows=3, waiting=12)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[OpenAI]:
    with serving(service) as url, client_of(url) as found:
        yield found


def ids_of(prompt: str) -> list[int]:
    return tiny_tokenizer()(prompt)["input_ids"]


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="'tiny', not 'other'"):
        client.models.retrieve("other")


def test_a_completion_is_what_generate_gives(client: OpenAI) -> None:
    done = client.completions.create(**GREEDY, prompt="once", max_tokens=12)
    tokens = stock_tokens(ids_of("once"), 12)
    assert done.choices[0].text == text_of(tokens) and done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (5, 12, 17)
    by_ids = client.completions.create(**GREEDY, prompt=ids_of("once"), max_tokens=12)
    assert by_ids.choices[0].text == done.choices[0].text
    assert client.completions.create(**GREEDY, prompt="once").usage.completion_tokens == 16  # pyright: ignore


def test_several_prompts_and_choices(client: OpenAI) -> None:
    done = client.completions.create(**GREEDY, prompt=["one", "two!"], n=2, max_tokens=5)
    texts = [text_of(stock_tokens(ids_of(prompt), 5)) for prompt in ("one", "two!")]
    assert [choice.text for choice in done.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage is not None and (done.usage.prompt_tokens, done.usage.completion_tokens) == (9, 20)


def test_a_chat_goes_through_the_template(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "be brief"}, ASK]
    done = client.chat.completions.create(**GREEDY, messages=messages, max_completion_tokens=10)
    tokens = stock_tokens(chat_ids(*messages), 10)
    message = done.choices[0].message
    assert message.content == text_of(tokens) and message.role == "assistant"
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        ASK,
    ]
    again = client.chat.completions.create(**GREEDY, messages=parts, max_tokens=10)
    assert again.choices[0].message.content == message.content
    longer: list[Any] = [*messages, message.model_dump(), ASK]  # as clients send an answer back
    follow = client.chat.completions.create(**GREEDY, messages=longer, max_tokens=4)
    reply = {"role": "assistant", "content": message.content}
    assert follow.choices[0].message.content == text_of(stock_tokens(chat_ids(*messages, reply, ASK), 4))


def test_a_chat_may_fill_the_length_of_the_model(client: OpenAI) -> None:
    done = client.chat.completions.create(**GREEDY, messages=[ASK])  # pyright: ignore[reportArgumentType]
    assert done.usage is not None
    room = 256 - done.usage.prompt_tokens
    tokens = stock_tokens(chat_ids(ASK), room)
    assert done.usage.completion_tokens == len(tokens)
    assert done.choices[0].finish_reason == ("stop" if tokens[-1] == 2 else "length")


def test_streams_carry_the_same_text(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            **GREEDY,
            messages=[ASK],
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},  # pyright: ignore
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == text_of(stock_tokens(chat_ids(ASK), 20)) and len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1
    plain = client.completions.create(**GREEDY, prompt=["one", "two!"], max_tokens=6, stream=True)
    texts = {0: "", 1: ""}
    for chunk in plain:
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [text_of(stock_tokens(ids_of(prompt), 6)) for prompt in ("one", "two!")]


def test_stop_strings_and_special_tokens_end_the_text(client: OpenAI) -> None:
    tokens = stock_tokens(ids_of("once"), 40)
    text = text_of(tokens)
    stop = next(
        text[i : i + 2]
        for i in range(8, len(text))
        if text.find(text[i : i + 2]) == i and "\ufffd" not in text[i : i + 2]
    )
    for stream in (False, True):
        done: Any = client.completions.create(
            **GREEDY, prompt="once", max_tokens=40, stop=["never", stop], stream=stream
        )
        choices = [chunk.choices[0] for chunk in done] if stream else done.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_special_tokens_end_the_text(client: OpenAI) -> None:
    eos = client.completions.create(**GREEDY, prompt="p22", max_tokens=40)
    tokens = stock_tokens(ids_of("p22"), 40)
    assert tokens[-1] == 2 and len(tokens) < 40
    assert eos.choices[0].text == text_of(tokens) and eos.choices[0].finish_reason == "stop"
    assert eos.usage is not None and eos.usage.completion_tokens == len(tokens)
    tokens = stock_tokens(ids_of("p54"), 40)
    at = tokens.index(4)  # <|assistant|>, which is no part of the text
    cut = client.completions.create(**GREEDY, prompt="p54", max_tokens=40, stop="<|assistant|>")
    assert cut.choices[0].text == text_of(tokens[:at]) and cut.choices[0].finish_reason == "stop"


def test_requests_together_are_answered_as_alone(client: OpenAI) -> None:
    prompts = [f"prompt {number} " * (1 + number % 4) for number in range(10)]

    def ask(number: int) -> str:
        most = 5 + 7 * (number % 3)
        return client.completions.create(**GREEDY, prompt=prompts[number], max_tokens=most).choices[0].text

    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(ask, range(10)))
    assert together == [text_of(stock_tokens(ids_of(prompt), 5 + 7 * (n % 3))) for n, prompt in enumerate(prompts)]


def test_a_seed_repeats_beside_other_requests(client: OpenAI) -> None:
    def ask(seed: int | None, n: int = 1) -> list[str]:
        asked: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "seed": seed, "n": n}
        done = client.completions.create(model=NAME, prompt="once", max_tokens=12, **asked, extra_body={"top_k": 100})
        return [choice.text for choice in done.choices]

    alone = ask(7)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, (7, 8, 7)))[::2] == [alone, alone]
    assert ask(7, n=3) == [*alone, *ask(8), *ask(9)]
    assert len({*ask(None, n=3), *alone}) == 4  # without a temperature too, the protocol samples


def test_a_client_that_leaves_frees_its_row(client: OpenAI, service: Service) -> None:
    endless: dict[str, Any] = {**GREEDY, "prompt": LONG, "max_tokens": 240}
    stream = client.completions.create(**endless, stream=True)
    next(iter(stream))
    (request,) = service.worker._running
    stream.close()
    wait_for(lambda: request.finish is not None)
    assert request.finish == "cancelled"
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.with_options(timeout=0.1).completions.create, **endless)
        wait_for(lambda: service.worker._running)
        (request,) = service.worker._running
        with pytest.raises(openai.APITimeoutError):
            call.result()
    wait_for(lambda: request.finish is not None)
    assert request.finish == "cancelled"
    wait_for(lambda: not service.worker.runner.busy)


def test_a_full_queue_is_refused_and_the_others_are_served(
    client: OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, entered, opened = service.worker.runner, threading.Event(), threading.Event()
    admit = runner.admit

    def gated(request: Any) -> None:
        entered.set()
        opened.wait(20)
        admit(request)

    def ask(count: int) -> list[str]:
        done = client.completions.create(**GREEDY, prompt=["a"] * count, max_tokens=20)
        return [choice.text for choice in done.choices]

    monkeypatch.setattr(runner, "admit", gated)  # holds the worker for as long as a long prompt would
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, 1)
        entered.wait(20)
        rest = pool.submit(ask, 12)
        wait_for(lambda: len(service.worker._queue) == 12)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(1)
        opened.set()
        texts = [*first.result(), *rest.result()]
    assert refused.value.code == "rate_limit_exceeded" and refused.value.response.headers["retry-after"] == "1"
    assert texts == [text_of(stock_tokens(ids_of("a"), 20))] * 13
