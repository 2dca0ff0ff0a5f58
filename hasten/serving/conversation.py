"""Turns a conversation into the ids of a prompt, through the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.errors import TokenizerError
from hasten.json_file import shown


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the ids of the conversation up to the start of the assistant's next turn.

    messages: with role and content. Raises TokenizerError where the tokenizer has no chat template, and where its
    template raises for these messages (many refuse a system message, or two turns of one role in a row)."""
    if not getattr(tokenizer, "chat_template", None):
        raise TokenizerError(
            "a conversation was given, and the tokenizer has no chat template. Load a checkpoint that was trained to "
            "chat, or let the model continue plain text (hasten generate --raw, /v1/completions)."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # the template is the checkpoint's own code, which can raise anything
        roles = ", ".join(str(message["role"]) for message in messages)
        raise TokenizerError(
            f"the chat template does not take this conversation (roles: {roles}): {type(error).__name__}: "
            f"{shown(error)}. Change the messages to what the template takes; many take no system message."
        ) from error
    return list(encoded["input_ids"])
