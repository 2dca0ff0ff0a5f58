"""Reads rows of chat messages: checks every message, and converts ShareGPT's spelling to that of chat templates.

A chat template takes `messages`: dicts with `role` and `content`. ShareGPT rows have `conversations` of `from` and
`value`, and other names for the roles. TRL renames the keys and keeps the names, so that a template would write
"human" and "gpt" where the model knows "user" and "assistant".
"""

from collections.abc import Mapping
from typing import Any

from hasten.suggest import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from` -> role. A function call is what the assistant wrote, and is trained on as it stands."""
PASSED = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")
"""Keys of a message that templates read."""
WEIGHTS = ("weight", "train", "loss", "loss_weight", "mask", "trainable")
"""Keys with which other trainers choose the messages that are learned; TRL would ignore them."""


class RowError(ValueError):
    """A row that cannot be trained on as it is; the message says why, without the row's number."""


def to_messages(row: Any) -> list[dict[str, Any]]:
    """Returns the messages of one row, in the spelling of chat templates, with the keys that have a value.

    row: a list of {"role", "content"} or of ShareGPT's {"from", "value"}. Raises RowError for anything else: no message,
    other roles, content that is no text (a list of parts is multimodal), no assistant to learn from.
    """
    if not isinstance(row, list):
        raise RowError(f"has {_kind(row)} in place of a list of messages")
    if not row:
        raise RowError("has no message")
    found = []
    for number, message in enumerate(row, 1):
        try:
            found.append(_message(message))
        except RowError as error:
            raise RowError(f"message {number} {error}") from error
    if not any(message["role"] == "assistant" for message in found):
        raise RowError("has no message of the assistant, so there is nothing to learn")
    return found


def prompt_messages(row: Any) -> list[dict[str, Any]]:
    """Does what `to_messages` does for a prompt, which needs no assistant."""
    if not isinstance(row, list) or not row:
        raise RowError(f"has {_kind(row)} in place of a list of messages")
    return [_message(message) for message in row]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"is {_kind(message)}, and must have a role and content")
    given = {name: value for name, value in message.items() if value is not None}
    spelled = {"from", "value"} & given.keys()
    if spelled and {"role", "content"} & given.keys():
        raise RowError(f"has both {' and '.join(sorted(given))}; keep role and content, or from and value")
    if spelled:
        given = _from_sharegpt(given)
    if weights := [name for name in WEIGHTS if name in given]:
        raise RowError(
            f"has {', '.join(weights)}, which the loss would ignore; remove it, and set train.assistant_only_loss to learn "
            "from the assistant alone"
        )
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise RowError(f"has the role {_shown(role)}{_role_hint(role)}; roles are {', '.join(ROLES)}")
    if content is None and role == "assistant" and isinstance(given.get("tool_calls"), list) and given["tool_calls"]:
        return given
    if not isinstance(content, str):
        more = "; only text can be trained on" if isinstance(content, list | dict) else ""
        raise RowError(f"({role}) has {_kind(content)} as content{more}")
    return given


def _from_sharegpt(given: Mapping[str, Any]) -> dict[str, Any]:
    speaker = given.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT:
        hint = did_you_mean(speaker.strip().lower(), SHAREGPT) if isinstance(speaker, str) else ""
        raise RowError(f"is from {_shown(speaker)}{hint}; known are {', '.join(SHAREGPT)}")
    others = {name: value for name, value in given.items() if name not in ("from", "value")}
    return {"role": SHAREGPT[speaker], "content": given.get("value"), **others}


def _role_hint(role: Any) -> str:
    if not isinstance(role, str):
        return ""
    meant = SHAREGPT.get(role.strip().lower())
    return f" (did you mean {meant}?)" if meant else did_you_mean(role.strip().lower(), ROLES)


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), f"a {type(value).__name__}")
