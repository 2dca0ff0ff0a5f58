"""The messages of the OpenAI protocol: request bodies, errors, choices and chunks.

A field that is not implemented is an error unless its value asks for nothing; so is a field that the protocol does not
have."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hasten.errors import HastenError
from hasten.suggest import did_you_mean

Text = Annotated[str, Field(min_length=1)]

WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
)
"""Fields that do not change the answer."""
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
}
"""Fields that are not implemented -> the values that ask for nothing."""


class ApiError(HastenError):
    """An error of a call, with its HTTP status. code, param: as in OpenAI's error objects."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Returns the JSON object of the response."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pads chunks against traffic analysis; has no effect here


class CallBody(BaseModel):
    """What both kinds of calls have. top_k and repetition_penalty are not OpenAI's; other servers have them too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    n: int | None = Field(None, ge=1, le=16)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Raises ApiError for fields that are not implemented or not known, and for combinations that the protocol
        refuses."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in WITHOUT_EFFECT:
                continue
            if name not in UNSUPPORTED:
                known = [*type(self).model_fields, *UNSUPPORTED, *WITHOUT_EFFECT]
                raise ApiError(400, f"unknown field {name!r}{did_you_mean(name, known)}", param=name)
            if not any(value == nothing and type(value) is type(nothing) for nothing in UNSUPPORTED[name]):
                raise ApiError(400, f"{name} is not supported; leave it out", "unsupported_parameter", name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")

    def sequences(self) -> int:
        """Returns how many answers are asked for."""
        return self.n or 1

    def answer_limit(self) -> int | None:
        """Returns the most new tokens; None = as many as the model's length allows."""
        return self.max_tokens


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """developer: OpenAI's newer name of system. Other fields, which clients send back with an assistant's message, must
    be empty."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Returns role, text and name, as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        name = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **name}


class ChatBody(CallBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)

    def check(self) -> None:
        """As of both kinds of calls."""
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
        for message in self.messages:
            if given := [name for name, value in (message.model_extra or {}).items() if value not in (None, [], {})]:
                raise ApiError(400, f"messages with {given[0]} are not supported", "unsupported_parameter", "messages")

    def answer_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Ids = Annotated[list[int], Field(min_length=1)]


class CompletionBody(CallBody):
    """prompt: text, ids, or several of either."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # pyright: ignore[reportReturnType]

    def sequences(self) -> int:
        return super().sequences() * len(self.prompts())

    def answer_limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # the protocol's default


class ChatStyle:
    """How choices of a chat are written."""

    prefix: ClassVar[str] = "chatcmpl"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"
    opening: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}

    @staticmethod
    def choice(text: str) -> dict[str, Any]:
        """Returns the answer's part of a choice."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @staticmethod
    def delta(text: str) -> dict[str, Any]:
        """Returns the answer's part of a choice in a chunk."""
        return {"delta": {"content": text} if text else {}}


class CompletionStyle:
    """How choices of a completion are written."""

    prefix: ClassVar[str] = "cmpl"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"
    opening: ClassVar[dict[str, Any] | None] = None

    @staticmethod
    def choice(text: str) -> dict[str, Any]:
        """Returns the answer's part of a choice."""
        return {"text": text}

    delta = choice


Style = type[ChatStyle] | type[CompletionStyle]


def numbered(index: int, part: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
    """Returns a choice."""
    return {"index": index, **part, "logprobs": None, "finish_reason": finish}
