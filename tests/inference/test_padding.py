"""Ragged prompts in one batch, padded on either side, continue token for token as each row does alone."""

from typing import Any

import pytest
import torch
from support import EOS, PAD, padded, prompts, twins, until_eos

from hasten.errors import InputError
from hasten.overlays.cache_name import CACHE
from hasten.testing.tiny import FAMILY_CONFIGS, tiny_tokenizer

NEW = 12


def alone(model: Any, rows: list[torch.Tensor]) -> list[list[int]]:
    """Each row's greedy continuation by itself."""
    return [until_eos(model.generate(row[None], max_new_tokens=NEW, do_sample=False)[0, len(row) :]) for row in rows]


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_batched_equals_alone(model_type: str) -> None:
    """B = 1, 2, 4, 8; left, right and both sides; pad == eos and pad != eos; windows of 8 in rows of up to 32."""
    ours, stock = twins(model_type)
    rows = prompts()
    expected = alone(stock, rows)
    assert len({tuple(ids) for ids in expected}) == len(rows), "the continuations must differ for this to show anything"
    for count, side, pad in [(b, s, p) for b in (1, 2, 4, 8) for s in ("left", "right") for p in (PAD, EOS)] + [
        (8, "both", PAD)
    ]:
        ids, mask = padded(rows[:count], side, pad)
        output = ours.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=pad
        )
        for row, wanted, got in zip(rows, expected, output, strict=False):
            new = got[ids.shape[1] :].tolist()
            assert new[: len(wanted)] == wanted, (count, side, pad)
            assert set(new[len(wanted) :]) <= {pad}
            assert got[ids.shape[1] - len(row) : ids.shape[1]].tolist() == row.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_inferred_from_the_pad_token(side: str) -> None:
    ours, stock = twins("llama")
    rows = prompts(4)
    ids, _ = padded(rows, side)
    output = ours.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert [until_eos(new) for new in output[:, ids.shape[1] :]] == alone(stock, rows)


def test_padding_is_not_guessed_where_pad_is_eos() -> None:
    """Then an EOS may be part of the prompt, so every position is read, as in transformers."""
    ours, stock = twins("llama")
    ids, _ = padded(prompts(2), "right", EOS)
    wanted = stock.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=EOS)
    assert torch.equal(ours.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=EOS), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_as_prompt(side: str, with_ids: bool) -> None:
    ours, stock = twins("llama")
    rows = prompts(4)
    ids, mask = padded(rows, side)
    also = {"input_ids": ids} if with_ids else {}
    output = ours.generate(
        inputs_embeds=ours.get_input_embeddings()(ids), attention_mask=mask, max_new_tokens=NEW, do_sample=False, **also
    )
    new = output[:, ids.shape[1] :] if with_ids else output
    assert [until_eos(row) for row in new] == alone(stock, rows)


def test_positions_given_by_the_caller_move_with_their_tokens() -> None:
    ours, _ = twins("llama")
    rows = prompts(4)
    shifted = [torch.arange(len(row)) * 2 for row in rows]
    results = []
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        positions, _ = padded(shifted, side)
        output = ours.generate(ids, attention_mask=mask, position_ids=positions, max_new_tokens=NEW, do_sample=False)
        results.append(output)
    assert torch.equal(*results)
    plain = ours.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(plain, results[0]), "the positions must matter for this to show anything"


def test_a_hole_in_the_mask_is_as_if_it_were_not_there() -> None:
    ours, stock = twins("mistral")
    row = prompts(2)[1]
    ids = torch.cat([row[:9], torch.tensor([PAD, PAD]), row[9:]])[None]
    output = ours.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=NEW, do_sample=False)
    assert until_eos(output[0, ids.shape[1] :]) == alone(stock, [row])[0]


def test_a_cache_goes_on_where_it_stopped_and_fixes_the_padding() -> None:
    ours, stock = twins("gemma2")
    row = prompts(2)[1][None]
    first = ours.generate(row, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    turn = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], dim=1)
    resumed = ours.generate(turn, **{CACHE: first[CACHE]}, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(resumed, stock.generate(turn, max_new_tokens=NEW, do_sample=False))
    again = ours.generate(row, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    mask = torch.ones_like(turn)
    mask[0, -1] = 0
    with pytest.raises(InputError, match=CACHE):
        ours.generate(turn, attention_mask=mask, **{CACHE: again[CACHE]}, max_new_tokens=4)


def test_rows_of_padding_only_are_refused() -> None:
    ours, _ = twins("llama")
    ids, mask = padded(prompts(4), "right")
    mask[2] = 0
    with pytest.raises(InputError, match=r"sequences \[2\]"):
        ours.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(InputError, match=r"sequences \[0\]"):
        ours.generate(torch.full((1, 3), PAD), max_new_tokens=2)
    with pytest.raises(InputError, match=r"sequences \[0, 1\]"):
        ours.generate(torch.empty(2, 0, dtype=torch.long), max_new_tokens=2)


def test_prompts_of_another_type_or_shape_are_refused() -> None:
    ours, _ = twins("llama")
    ids, mask = padded(prompts(2), "left")
    encoding = tiny_tokenizer()("hello", return_tensors="pt")
    for wrong, named, message in [
        (encoding, {}, r"generate\(\*\*tokenizer"),
        ([[1, 2]], {}, "a list as inputs"),
        (ids[0], {}, "has shape"),
        (ids, {"attention_mask": mask[:, 1:]}, "one mask entry per position"),
        (ids, {"attention_mask": mask[:1]}, "one mask entry per position"),
        (ids, {"position_ids": mask[:, 1:]}, "position_ids has shape"),
    ]:
        with pytest.raises(InputError, match=message):
            ours.generate(wrong, max_new_tokens=2, **named)


def test_what_the_caller_gave_stays_as_it_was() -> None:
    ours, _ = twins("llama")
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    batch = tokenizer(["one", "a longer prompt"], return_tensors="pt", padding=True)
    given = {name: tensor.clone() for name, tensor in batch.items()}
    state = {name: value for name, value in vars(tokenizer).items() if not name.startswith("_tokenizer")}
    configs = (ours.config.to_dict(), ours.generation_config.to_dict())
    tokenizer_text = tokenizer._tokenizer.to_str()
    ours.generate(**batch, max_new_tokens=4)
    assert all(torch.equal(batch[name], tensor) for name, tensor in given.items())
    assert {n: v for n, v in vars(tokenizer).items() if not n.startswith("_tokenizer")} == state
    assert tokenizer.padding_side == "right" and tokenizer._tokenizer.to_str() == tokenizer_text
    assert (ours.config.to_dict(), ours.generation_config.to_dict()) == configs
