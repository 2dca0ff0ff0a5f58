"""Continuous batching: requests that enter and leave rows at any step get the tokens that they get alone."""

from typing import Any

import pytest
import torch
from device_kit import DEVICE
from product_kit import Products

from hasten.errors import InputError
from hasten.families import FAMILIES
from hasten.inference.decode.batch import DecodeBatch, unbatched
from hasten.inference.decode.request import Limits, Piece, Request
from hasten.inference.decode.sampling import Sampling
from hasten.inference.text import TextStream, decoder
from hasten.methods import CausalLMMethods
from hasten.patching import apply
from hasten.testing.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SIZES = ((5, 12), (11, 20), (1, 3), (30, 7), (8, 1), (17, 40))
"""Tokens of the prompt, most new tokens."""


def stock_model(family: str = "llama", **changes: Any) -> Any:
    """The head is not tied: a tied one mostly repeats the last token, whatever the layers do."""
    return tiny_model(family, tie_word_embeddings=False, **changes).to(DEVICE)


def overlaid(family: str = "llama", **changes: Any) -> Any:
    model = stock_model(family, **changes)
    apply(model, methods=CausalLMMethods)
    return model


def request(length: int, most: int, sampling: Sampling | None = None, **other: Any) -> Request:
    generator = torch.Generator().manual_seed(length)
    stop, deliver = other.pop("stop", ()), other.pop("deliver", lambda piece: None)
    prompt = torch.randint(6, 280, (length,), generator=generator).tolist()
    limits = Limits(most, **other)
    return Request(prompt, limits, sampling or Sampling(), TextStream(decoder(TOKENIZER), stop), deliver)


def run(batch: DecodeBatch, requests: list[Request]) -> None:
    waiting = list(requests)
    while waiting or batch.busy:
        if waiting and batch.free:
            batch.admit(waiting.pop(0))
        batch.advance()


def stocks(model: Any, one: Request, **asked: Any) -> list[int]:
    ids = torch.tensor([one.prompt], device=DEVICE)
    asked = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **asked}
    return model.generate(ids, max_new_tokens=one.limits.max_tokens, **asked)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_each_request_alone(family: str) -> None:
    stock, batch = stock_model(family), DecodeBatch(overlaid(family), 3)
    requests = [request(*size) for size in SIZES]
    run(batch, requests)
    for one in requests:
        assert one.tokens == stocks(stock, one), one.limits
        assert one.finish == "length"


def test_rows_serve_many_requests_and_nothing_grows() -> None:
    batch = DecodeBatch(overlaid(), 2)
    long = request(3, 100)
    batch.admit(long)
    for length in range(1, 12):  # enter and leave beside the long one; most of the time a row is unused
        short = request(length, 2)
        batch.admit(short)
        while short.finish is None:
            batch.advance()
            batch.advance()
        idle = batch._rows.index(None)
        batch.advance()
        assert int(batch._cache.slots_B[idle]) <= 1
    assert len(batch._cache.view(0).blocks) == 1
    run(batch, [])
    assert long.tokens == stocks(stock_model(), long)
    assert not batch._cache.view(0).blocks and batch.free == 2


def test_sampled_tokens_are_those_of_each_request_alone() -> None:
    model = overlaid()
    samplings = [
        Sampling(1.0, seed=1),
        Sampling(0.7, top_k=20, seed=2),
        Sampling(),
        Sampling(1.2, top_p=0.8, seed=3),
        Sampling(0.9, top_k=50, top_p=0.95, repetition_penalty=1.3, seed=4),
        Sampling(repetition_penalty=1.5),
    ]

    def make() -> list[Request]:
        return [request(*size, sampling) for size, sampling in zip(SIZES, samplings, strict=True)]

    together, batch = make(), DecodeBatch(model, 3)
    run(batch, together)
    for number, one in enumerate(make()):
        run(batch, [one])
        assert one.tokens == together[number].tokens, samplings[number]
    assert len({tuple(one.tokens[:5]) for one in together}) == len(together)


def test_a_repetition_penalty_is_transformers() -> None:
    one, batch = request(9, 15, Sampling(repetition_penalty=1.4)), DecodeBatch(overlaid(), 2)
    run(batch, [one, request(4, 20)])
    stock = stock_model()
    assert one.tokens == stocks(stock, one, repetition_penalty=1.4) != stocks(stock, one)


def test_a_request_ends_at_eos_and_at_stop_strings() -> None:
    batch, free = DecodeBatch(overlaid(), 2), request(5, 30)
    run(batch, [free])
    at = next(i for i in range(4, 30) if free.tokens[i] not in free.tokens[:i])
    ended = request(5, 30, eos=(free.tokens[at],))
    text = decoder(TOKENIZER)(free.tokens)
    stop = next(
        text[i : i + 3]
        for i in range(6, len(text))
        if text.find(text[i : i + 3]) == i and "\ufffd" not in text[i : i + 3]
    )
    pieces: list[Piece] = []
    stopped = request(5, 30, stop=(stop,), deliver=pieces.append)
    run(batch, [ended, stopped])
    assert ended.tokens == free.tokens[: at + 1] and ended.finish == "stop"
    assert stopped.finish == "stop" and len(stopped.tokens) < 30
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_a_cancelled_request_frees_its_row() -> None:
    batch, pieces = DecodeBatch(overlaid(), 2), []
    kept, gone = request(5, 25), request(7, 100, deliver=pieces.append)
    for one in (kept, gone):
        batch.admit(one)
    for _ in range(4):
        batch.advance()
    had = len(gone.tokens)
    gone.cancel()
    batch.advance()
    assert batch.free == 1 and gone.finish == "cancelled" and pieces[-1] == Piece(finish="cancelled")
    after = request(12, 9)
    run(batch, [after])
    stock = stock_model()
    assert len(gone.tokens) == had
    assert kept.tokens == stocks(stock, kept) and after.tokens == stocks(stock, after)


def test_a_sequence_may_fill_the_cache_and_not_more() -> None:
    batch, other = DecodeBatch(overlaid(), 2), request(3, 4)  # 128 positions
    batch.admit(other)
    for length, most in ((100, 29), (0, 4), (129, 1)):
        with pytest.raises(InputError, match="a sequence holds 128 tokens"):
            batch.admit(request(length, most))
        assert batch.free == 1
    full = request(100, 28)
    run(batch, [full])
    stock = stock_model()
    assert full.tokens == stocks(stock, full) and other.tokens == stocks(stock, other)


def test_beyond_one_block() -> None:
    sizes = {"max_position_embeddings": 600}
    batch, requests = DecodeBatch(overlaid(**sizes), 2), [request(250, 20), request(4, 30), request(300, 5)]
    run(batch, requests)
    stock = stock_model(**sizes)
    for one in requests:
        assert one.tokens == stocks(stock, one)


@pytest.mark.usefixtures("kernels")
def test_kernels_read_and_write_one_row() -> None:
    requests, batch = [request(5, 2), request(3, 2)], DecodeBatch(overlaid(num_hidden_layers=1), 2)
    run(batch, requests)
    stock = stock_model(num_hidden_layers=1)
    for one in requests:
        assert one.tokens == stocks(stock, one)


def test_a_failed_prompt_takes_no_row() -> None:
    model = overlaid()
    batch, running = DecodeBatch(model, 2), request(6, 12)
    batch.admit(running)
    batch.advance()

    with Products(fail=(64, 128, 2)), pytest.raises(torch.OutOfMemoryError):  # in the MLP
        batch.admit(request(8, 3))
    run(batch, [after := request(8, 3)])
    stock = stock_model()
    assert running.tokens == stocks(stock, running) and after.tokens == stocks(stock, after)


def test_what_a_batch_does_not_decode_as_generate_does_has_a_reason() -> None:
    model = overlaid()
    assert unbatched(model, ("cpu",)) is None
    assert unbatched(model) == "the model is not on a GPU"
    model.generation_config.no_repeat_ngram_size = 2
    assert unbatched(model, ("cpu",)) == "the generation config has no_repeat_ngram_size=2"
    model.generation_config.no_repeat_ngram_size = None
    model.generation_config.num_beams = 3
    assert "num_beams" in str(unbatched(model, ("cpu",)))
