"""What a server refuses, each time with an error object of the protocol, and that it goes on afterwards."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from serving_kit import NAME, client_of, serving, stock_tokens, text_of, tiny_service, wait_for

from hasten.errors import InputError, MissingExtraError
from hasten.serving.server import bind, hosts_of, require_extra
from hasten.serving.service import Service
from hasten.testing.tiny import tiny_tokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
PATHS = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(tiny_service(rows=2, waiting=4)) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with client_of(url) as found:
        yield found


def post(url: str, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    text = body if isinstance(body, str) else json.dumps(body)
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=20)) as connection:
        connection.request("POST", path, text, {"Content-Type": "application/json", **headers})
        with connection.getresponse() as response:
            content = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(content) if is_json else {}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature: "),
    ({"temperature": "0.5"}, "temperature: "),
    ({"temperature": True}, "temperature: "),
    ({"temperature": 2.1}, "temperature: "),
    ({"top_p": 0}, "top_p: "),
    ({"top_k": -1}, "top_k: "),
    ({"repetition_penalty": 0}, "repetition_penalty: "),
    ({"repetition_penalty": 1e-40}, "repetition_penalty: "),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"max_tokens": 2.5}, "max_tokens: "),
    ({"n": 0}, "n: "),
    ({"n": 17}, "n: "),
    ({"n": 5}, "5 sequences were asked for; one call may have 4"),
    ({"seed": 2**63}, "seed: "),
    ({"stop": ""}, "stop."),
    ({"stop": ["a", ""]}, "stop."),
    ({"stop": list("abcde")}, "stop."),
    ({"stream": "yes"}, "stream: "),
    ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
    ({"logprobs": True}, "logprobs is not supported"),
    ({"logprobs": 0}, "logprobs is not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"temprature": 0.5}, "unknown field 'temprature' (did you mean temperature"),
    ({"max_tokens": 300}, "at least 300 new ones are asked for; this model was loaded for sequences of 256"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED, ids=lambda one: json.dumps(one)[:40])
def test_fields_that_cannot_take_effect_are_refused(url: str, fields: dict[str, Any], said: str) -> None:
    for path, prompt in zip(PATHS, ({"messages": MESSAGES}, {"prompt": "hi"}), strict=True):
        status, answer = post(url, path, {"model": NAME, **prompt, **fields})
        assert status == 400 and said in answer["error"]["message"], answer
        assert answer["error"]["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(url: str) -> None:
    nothing = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": None, "n": None, "stop": None, "user": "someone",
        "store": False, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "stream_options": None,
    }  # fmt: skip
    status, answer = post(url, PATHS[0], {"model": NAME, "messages": MESSAGES, "max_tokens": 1, **nothing})
    assert status == 200, answer


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (PATHS[0], {"model": NAME}, "messages: Field required"),
        (PATHS[0], {"messages": MESSAGES}, "model: Field required"),
        (PATHS[0], {"model": NAME, "messages": []}, "messages: "),
        (PATHS[0], {"model": NAME, "messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        (PATHS[0], {"model": NAME, "messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (
            PATHS[0],
            {"model": NAME, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
        (
            PATHS[0],
            {"model": NAME, "messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages with tool_calls are not supported",
        ),
        (PATHS[0], {"model": NAME, "messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 3}, "differ"),
        (PATHS[1], {"model": NAME, "prompt": []}, "prompt"),
        (PATHS[1], {"model": NAME, "prompt": [[]]}, "prompt"),
        (PATHS[1], {"model": NAME, "prompt": [5, 400]}, "the tokenizer has ids 0 to 261, not 400"),
        (PATHS[1], {"model": NAME, "prompt": [-1]}, "not -1"),
        (PATHS[1], {"model": NAME, "prompt": 5}, "prompt"),
        (PATHS[1], {"model": NAME, "prompt": ["a"] * 5}, "5 sequences were asked for; one call may have 4"),
        (PATHS[1], {"model": NAME, "prompt": "x", "echo": True}, "echo is not supported"),
        (PATHS[1], {"model": NAME, "prompt": "x" * 256, "max_tokens": 1}, "the prompt has 257 tokens"),
        (PATHS[1], "{", "JSON"),
        (PATHS[1], "[]", ""),
    ],
    ids=str,
)
def test_bodies_that_are_no_call_are_refused(url: str, path: str, body: Any, said: str) -> None:
    status, answer = post(url, path, body)
    assert status == 400 and said in answer["error"]["message"], answer


def test_errors_are_those_of_the_official_client(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'tiny', not 'gpt-4'") as found:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=NAME, prompt="x" * 300, stream=True)
    assert long.value.code == "context_length_exceeded"


def test_paths_methods_and_bodies_that_are_too_large(url: str) -> None:
    assert post(url, "/v1/embeddings", {})[0] == 404
    assert post(url, "/v1/models", {})[0] == 405
    assert post(url, PATHS[1], {"model": NAME, "prompt": "x" * 2**24})[0] == 413
    assert post(url, PATHS[1], json.dumps({"model": NAME, "prompt": "x"}), **{"Content-Type": "text/plain"})[0] == 400


def test_a_key_is_needed_where_one_is_set() -> None:
    with serving(tiny_service(), key="sésame") as url:
        for key in ("wrong", "sésam"):
            status, answer = post(
                url, PATHS[1], {"model": NAME, "prompt": "x"}, Authorization=f"Bearer {key}".encode().decode("latin-1")
            )
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert post(url, PATHS[1], {"model": NAME, "prompt": "x"})[0] == 401
        right = "Bearer sésame".encode().decode("latin-1")
        assert post(url, PATHS[1], {"model": NAME, "prompt": "x", "max_tokens": 1}, Authorization=right)[0] == 200
    with serving(tiny_service(), key="sesame") as url:
        with client_of(url, "wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with client_of(url, "sesame") as known:
            assert len(list(known.models.list())) == 1


def test_a_server_on_loopback_answers_to_its_own_names_only() -> None:
    assert hosts_of("0.0.0.0") is None
    with serving(tiny_service(), hosts=hosts_of("127.0.0.1")) as url:
        port, call = url.rpartition(":")[2], {"model": NAME, "prompt": "x", "max_tokens": 1}
        for name in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
            assert post(url, PATHS[1], call, Host=name)[0] == 200
        for name in (f"rebound.example:{port}", "localhost.example", "[::1", ""):
            status, answer = post(url, PATHS[1], call, Host=name)
            assert status == 403 and answer["error"]["code"] == "wrong_host"


def test_a_tokenizer_without_chat_template_serves_completions() -> None:
    with serving(tiny_service(template=False)) as url, client_of(url) as client:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model=NAME, messages=MESSAGES)
        assert client.completions.create(model=NAME, prompt="x", max_tokens=3).choices[0].finish_reason


def test_a_template_that_refuses_is_an_error_of_the_call() -> None:
    service = tiny_service()
    service.tokenizer.chat_template = (
        "{{ raise_exception('no system role') if messages[0]['role'] == 'system' else 'x' }}"
    )
    with serving(service) as url, client_of(url) as client:
        with pytest.raises(openai.BadRequestError, match="no system role"):
            client.chat.completions.create(model=NAME, messages=[{"role": "system", "content": "x"}, *MESSAGES])
        assert client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=1).choices


def test_one_at_a_time_through_generate() -> None:
    """What continuous batching does not serve: here a model on a CPU."""
    service = tiny_service(devices=("cuda",))
    assert service.note == "one request at a time through model.generate, since the model is not on a GPU"
    before = torch.random.get_rng_state()
    with serving(service) as url, client_of(url) as client:
        tokens = stock_tokens(tiny_tokenizer()("once")["input_ids"], 12)
        chunks = list(client.completions.create(model=NAME, prompt="once", max_tokens=12, temperature=0, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(tokens) and len(chunks) > 4
        sampled = [
            client.completions.create(model=NAME, prompt="once", max_tokens=12, temperature=1.2, seed=seed).choices[0]
            for seed in (3, 3, 4)
        ]
        assert sampled[0].text == sampled[1].text != sampled[2].text
        stream = client.completions.create(model=NAME, prompt="once", max_tokens=240, temperature=0, stream=True)
        next(iter(stream))
        (request,) = service.worker._running
        stream.close()
        wait_for(lambda: request.finish is not None)
        assert request.finish == "cancelled"
    assert torch.equal(torch.random.get_rng_state(), before)


def failing(service: Service, error: type[BaseException], method: str) -> None:
    """Makes the runner's next call of `method` fail."""
    real = getattr(service.worker.runner, method)

    def once(*args: Any) -> Any:
        setattr(service.worker.runner, method, real)
        raise error("seeded")

    setattr(service.worker.runner, method, once)


@pytest.mark.parametrize("method", ["admit", "advance"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_runs_out_of_memory_fails_alone(method: str, stream: bool) -> None:
    service = tiny_service()
    asked: dict[str, Any] = {"model": NAME, "prompt": "once", "max_tokens": 5, "temperature": 0}
    with serving(service) as url, client_of(url) as client:
        failing(service, torch.OutOfMemoryError, method)
        with pytest.raises(openai.APIError, match="seeded"):
            list(client.completions.create(**asked, stream=stream))
        done = client.completions.create(**asked)
        assert done.choices[0].text == text_of(stock_tokens(tiny_tokenizer()("once")["input_ids"], 5))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_has_stopped_is_said_to_every_call() -> None:
    service = tiny_service()
    with serving(service) as url, client_of(url) as client:
        failing(service, KeyError, "advance")
        with pytest.raises(openai.InternalServerError, match="worker has stopped"):
            client.completions.create(model=NAME, prompt="once")
        with pytest.raises(openai.InternalServerError, match="worker has stopped") as later:
            client.completions.create(model=NAME, prompt="once")
        assert later.value.status_code == 503


def test_the_end_of_the_server_ends_requests() -> None:
    service = tiny_service()
    found: list[Any] = []

    def ask(url: str) -> None:
        with client_of(url) as client:
            try:
                found.append(client.completions.create(model=NAME, prompt="x", max_tokens=250, temperature=1))
            except openai.APIError as error:
                found.append(error)

    with serving(service) as url:
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        wait_for(lambda: service.worker._running)
    thread.join()
    assert len(found) == 1 and not service.worker._thread.is_alive()


def test_the_address_is_taken_before_anything_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="Pass another --port"):
        bind("127.0.0.1", taken.getsockname()[1], has_key=False)
    with pytest.raises(InputError, match="cannot be used"):
        bind("no such host", 0, has_key=False)
    assert not caplog.records
    bind("0.0.0.0", 0, has_key=False).close()
    assert "other machines can send requests to this server, without a key" in caplog.text


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}, which is not installed.*pip install 'hasten\[serve\]'"):
        require_extra()
