"""Checks a tokenizer's files before transformers reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.errors import TokenizerError
from hasten.json_file import JsonError, kind_of, parse_object, read_bytes, read_object, shown
from hasten.loading.config_rules import Rule, flag
from hasten.loading.template import LARGEST

VOCABULARY = "tokenizer.json"
LARGEST_VOCABULARY = 512 * 2**20
SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
LARGEST_ID = 2**24
"""No vocabulary has as many tokens. A larger id in a file would ask for an embedding of its size."""


def text(value: Any) -> str | None:
    """Validates a name or a template."""
    return None if isinstance(value, str) else "must be text"


def token(value: Any) -> str | None:
    """Validates a special token: its text, or an object with its `content`."""
    fits = isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))
    return None if fits else 'must be a token\'s text, or an object with its "content"'


def templates(value: Any) -> str | None:
    """Validates `chat_template`: one, or a list of named ones."""
    named = value if isinstance(value, list) else [{"name": "default", "template": value}]
    fits = all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in named
    )
    if not fits:
        return 'must be text, or a list of objects with "name" and "template"'
    return None if all(len(one["template"]) <= LARGEST for one in named) else f"has more than {LARGEST} characters"


def side(value: Any) -> str | None:
    """Validates `padding_side` and `truncation_side`."""
    return None if value in ("left", "right") else "must be left or right"


def length(value: Any) -> str | None:
    """Validates `model_max_length`, which is 10^30 where there is no limit."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= 1
    return None if fits else "must be a positive number"


def added(value: Any) -> str | None:
    """Validates `added_tokens_decoder`: id -> token."""
    fits = isinstance(value, dict) and all(
        key.isdecimal() and len(key) < 9 and int(key) <= LARGEST_ID and isinstance(one, dict) and token(one) is None
        for key, one in value.items()
    )
    return None if fits else f"must map ids from 0 to {LARGEST_ID} to tokens"


def ids(vocabulary: Mapping[str, Any]) -> str | None:
    """Validates token -> id."""
    for name, index in vocabulary.items():
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= LARGEST_ID:
            return f"{shown(name)}={shown(index)}: must be an id from 0 to {LARGEST_ID}"
    return None


TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(TOKENS, token),
    "chat_template": templates,
    **dict.fromkeys(("padding_side", "truncation_side"), side),
    "model_max_length": length,
    "tokenizer_class": text,
    **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "legacy"), flag),
    "added_tokens_decoder": added,
}


def check_tokenizer_files(folder: Path) -> None:
    """Raises TokenizerError, naming file and field, for tokenizer files that are no JSON objects or have values of
    another kind."""
    for name in SMALL_FILES:
        if (path := folder / name).is_file():
            found = read_object(path, TokenizerError)
            values = {field: found[field] for field in RULES if found.get(field) is not None}
            problems = [
                f"{field}={shown(value)} ({kind_of(value)}): {problem}"
                for field, value in values.items()
                if (problem := RULES[field](value)) is not None
            ]
            if name == "added_tokens.json" and (problem := ids(found)) is not None:
                problems.append(problem)
            _refuse(path, problems)
    if (path := folder / VOCABULARY).is_file():
        _check_vocabulary(path)
    for path in [folder / "chat_template.jinja", *sorted((folder / "chat_templates").glob("*.jinja"))]:
        if path.is_file():
            _check_template(path)


def _check_vocabulary(path: Path) -> None:
    """Parses tokenizer.json, which the Rust parser behind transformers then reads again."""
    try:
        found = parse_object(read_bytes(path, LARGEST_VOCABULARY).decode("utf-8"))
    except (JsonError, UnicodeDecodeError, OSError) as error:
        raise TokenizerError(f"{path}: {shown(error)}. Download or save it again") from error
    problems = []
    model = found.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict):
        problems.append(f"model is {kind_of(model)}: must be an object")
    elif isinstance(vocabulary, dict) and (problem := ids(vocabulary)) is not None:
        problems.append(f"model.vocab: {problem}")
    added = found.get("added_tokens") or []
    if not isinstance(added, list):
        problems.append(f"added_tokens is {kind_of(added)}: must be a list")
        added = []
    for place, entry in enumerate(added):
        numbered = {"id": entry.get("id")} if isinstance(entry, dict) else {"entry": entry}
        if (problem := ids(numbered)) is not None:
            problems.append(f"added_tokens[{place}].{problem}")
    _refuse(path, problems[:5])


def _check_template(path: Path) -> None:
    try:
        found = read_bytes(path, 4 * LARGEST).decode("utf-8")
    except (JsonError, UnicodeDecodeError, OSError) as error:
        raise TokenizerError(f"{path}: {shown(error)}. Download or save it again") from error
    if (problem := templates(found)) is not None:
        raise TokenizerError(f"{path} {problem}. Use the checkpoint's own")


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        lines = "".join(f"\n  - {line}" for line in problems)
        raise TokenizerError(f"{path} has fields that cannot be right ({len(problems)}). Save it again.{lines}")
