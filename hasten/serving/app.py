"""The HTTP side of `hasten serve`: FastAPI routes of the OpenAI protocol over a `Service`."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from hasten.inference.decode.request import Piece
from hasten.serving.protocol import ApiError, ChatBody, ChatStyle, CompletionBody, CompletionStyle, Style, numbered
from hasten.serving.service import Service
from hasten.serving.worker import Busy, Unavailable

LARGEST_BODY = 2**24
"""Bytes of a call."""
CLIENT_CLOSED = 499
"""Status of a call whose client has gone, for the log."""


class Answer:
    """The requests of one call, and the pieces that the worker's thread sends back."""

    def __init__(self, service: Service, body: ChatBody | CompletionBody, prompts: Sequence[list[int]]) -> None:
        """Queues the requests. Raises ApiError where they cannot be served."""
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def deliver(number: int) -> Callable[[Piece], None]:
            def send(piece: Piece) -> None:
                loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))

            return send

        self._prompt_tokens = sum(map(len, prompts))
        self.requests = service.requests(body, prompts, deliver)
        try:
            service.worker.submit(self.requests)
        except Busy as error:
            raise ApiError(429, str(error), "rate_limit_exceeded") from error
        except Unavailable as error:
            raise ApiError(503, str(error), "unavailable") from error

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields (number of the request, piece) until all have ended. Raises ApiError where one fails."""
        left = len(self.requests)
        while left:
            number, piece = await self._pieces.get()
            if piece.finish == "failed":
                raise ApiError(500, piece.error)
            left -= piece.finish is not None
            yield number, piece

    def cancel(self) -> None:
        """Ends requests that are running or waiting."""
        for request in self.requests:
            request.cancel()

    def usage(self) -> dict[str, int]:
        """Returns the counts of tokens so far; EOS counts."""
        new = sum(len(request.tokens) for request in self.requests)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }


class EventStream(StreamingResponse):
    """Server-sent events. Whenever the response ends, or the client leaves, the answer's requests are cancelled."""

    def __init__(self, events: AsyncIterator[str], answer: Answer) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def create_app(service: Service, api_key: str | None = None, hosts: Sequence[str] | None = None) -> FastAPI:
    """Returns the application. Starts the service's worker with the server, and ends it with the server.

    api_key: what calls must send as a bearer token; None = nothing. hosts: names of this server that a call's Host
    header may have, so that a web page cannot reach a server on loopback under a name of its own (DNS rebinding); None
    = any."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await run_in_threadpool(service.worker.close)

    async def admit(call: Request) -> None:
        name = _host_name(call.headers.get("host", ""))
        if hosts is not None and name not in hosts:
            raise ApiError(403, f"this server answers calls to {' and '.join(hosts)}, not to {name}", "wrong_host")
        given = call.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        if api_key is not None and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            raise ApiError(
                401, "a wrong API key, or none, was sent: send the server's as a bearer token", "invalid_api_key"
            )

    app = FastAPI(
        title="hasten", lifespan=life, dependencies=[Depends(admit)], docs_url=None, redoc_url=None,
        max_body_size=LARGEST_BODY,
    )  # fmt: skip
    _add_errors(app)
    model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "hasten"}

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> Any:
        _check_name(service, name)
        return model

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, call: Request) -> Response:
        return await _serve(service, body, call, ChatStyle)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, call: Request) -> Response:
        return await _serve(service, body, call, CompletionStyle)

    return app


async def _serve(service: Service, body: ChatBody | CompletionBody, call: Request, style: Style) -> Response:
    _check_name(service, body.model)
    body.check()
    answer = Answer(service, body, await run_in_threadpool(service.encode, body))
    head = {"id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(_events(answer, {**head, "object": style.chunk}, style, usage), answer)
    texts = [""] * len(answer.requests)
    leaving = asyncio.create_task(_left(call))
    leaving.add_done_callback(lambda task: answer.cancel())  # also when it is cancelled below: then all have ended
    try:
        async for number, piece in answer.pieces():
            texts[number] += piece.text
            if piece.finish == "cancelled":
                return Response(status_code=CLIENT_CLOSED)
    finally:
        leaving.cancel()
    choices = [
        numbered(number, style.choice(texts[number]), request.finish) for number, request in enumerate(answer.requests)
    ]
    return JSONResponse({**head, "object": style.whole, "choices": choices, "usage": answer.usage()})


async def _events(answer: Answer, head: dict[str, Any], style: Style, usage: bool) -> AsyncIterator[str]:
    """Yields the chunks of a streamed answer. An error after the first is a chunk too, as the status has been sent."""
    none = {"usage": None} if usage else {}
    try:
        for number in range(len(answer.requests)) if style.opening is not None else ():
            yield _event({**head, "choices": [numbered(number, style.opening or {}, None)], **none})
        async for number, piece in answer.pieces():
            yield _event({**head, "choices": [numbered(number, style.delta(piece.text), piece.finish)], **none})
    except ApiError as error:
        yield _event(error.body())
        return
    if usage:
        yield _event({**head, "choices": [], "usage": answer.usage()})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _left(call: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


def _host_name(header: str) -> str | None:
    """Returns the Host header without its port, None where it is not one."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"this server has the model {service.name!r}, not {name!r}", "model_not_found", "model")


def _add_errors(app: FastAPI) -> None:
    """Every error is an object as OpenAI's."""

    @app.exception_handler(ApiError)
    async def own(call: Request, error: ApiError) -> JSONResponse:
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(call: Request, error: RequestValidationError) -> JSONResponse:
        found = [(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors()]
        message = "; ".join(f"{place}: {problem}" if place else problem for place, problem in found)
        field = str(found[0][0]).partition(".")[0] or None
        return JSONResponse(ApiError(400, message, param=field).body(), 400)

    @app.exception_handler(HTTPException)
    async def other(call: Request, error: HTTPException) -> JSONResponse:
        message = f"{call.method} {call.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(call: Request, error: Exception) -> JSONResponse:  # uvicorn logs the traceback
        return JSONResponse(ApiError(500, f"{type(error).__name__}: {error}").body(), 500)
