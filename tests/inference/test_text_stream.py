"""Text of tokens that arrive one by one: nothing is lost, no character is cut, no text beyond a stop string."""

import random

import pytest

from hasten.inference.text import TextStream, decoder
from hasten.testing.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # one token per byte


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream, found = TextStream(decoder(TOKENIZER), stop), []
    for token in ids:
        found.append(stream.add(token))
        if stream.stopped:
            break
    return [*found, stream.end()], stream


@pytest.mark.parametrize("text", ["plain", "naïve 😀😃 日本語", "", "ends in part of one 😀"])
def test_characters_are_whole(text: str) -> None:
    found, _ = pieces(ids_of(text))
    assert "".join(found) == text and not any("\ufffd" in piece for piece in found)


def test_any_bytes_decode_as_they_do_together() -> None:
    generator = random.Random(0)
    for _ in range(30):
        ids = [generator.randrange(3, len(TOKENIZER)) for _ in range(40)]
        assert "".join(pieces(ids)[0]) == decoder(TOKENIZER)(ids)


def test_an_incomplete_character_comes_at_the_end() -> None:
    ids = ids_of("a😀")[:-1]
    assert pieces(ids)[0] == ["a", "", "", "", "\ufffd"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one ENTER END", ("END",), "one ENTER "),
        ("one EN", ("END",), "one EN"),
        ("aab", ("ab",), "a"),
        ("xaaab", ("aab",), "xa"),
        ("one\n\ntwo", ("\n\n", "tw"), "one"),
        ("both ab", ("b", "ab"), ""),
        ("日本語", ("本",), "日"),
        ("END", ("END",), ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    found, stream = pieces(ids_of(text), stop)
    assert "".join(found) == expected
    assert stream.stopped == (expected != text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    found, _ = pieces(ids_of("abEN cd"), ("END",))
    assert found == ["a", "b", "", "", "EN ", "c", "d", ""]
